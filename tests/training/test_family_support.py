"""The table of model families in the reference: of every family, without a failure, and as a run gives it."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.distributed import run_ranks
from tests.models.families import FAMILIES
from tests.training.family_support import COLUMNS, STYLES, row

REFERENCE = REPOSITORY / "docs/reference"
RECORD: dict[str, Any] = json.loads((REFERENCE / "models.json").read_text(encoding="utf-8"))
ROWS: dict[str, dict[str, str]] = RECORD["families"]


def test_the_table_has_every_family_and_column() -> None:
    assert list(ROWS) == list(FAMILIES) and set(STYLES) == set(FAMILIES)
    assert all(list(cells) == list(COLUMNS) for cells in ROWS.values())


def test_no_cell_failed_and_every_other_outcome_has_a_reason() -> None:
    cells = [cell for cells in ROWS.values() for cell in cells.values()]
    assert all(re.fullmatch(r"pass|(refused|not tried): [^\n]+", cell) for cell in cells)


def test_every_family_trains_and_is_measured() -> None:
    for family, cells in ROWS.items():
        always = [name for name in COLUMNS if not name.startswith(("packed", "several", "system"))]
        assert {cells[name] for name in [*always, "packed: eager"]} == {"pass"}, family


def test_the_page_shows_the_record() -> None:
    page = runpy.run_path(str(REFERENCE / "models.py"))["page"]
    shown = (REFERENCE / "models.md").read_text(encoding="utf-8")
    assert shown == page(RECORD), "run python -m docs.reference.models"
    reason = ROWS["gpt_oss"]["packed: sdpa"].removeprefix("refused: ")
    (number,) = re.findall(rf"(?m)^\[\^(\d+)\]: ``{re.escape(reason)}``$", shown)
    assert f"refused[^{number}]" in next(line for line in shown.splitlines() if line.startswith("| `gpt_oss`"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_gives_the_row_of_the_table(family: str, tmp_path: Path) -> None:
    (found,) = run_ranks(1, row, family, str(tmp_path))
    # A machine with a GPU tries more than one without.
    tried = [n for n in COLUMNS if not any(c[n].startswith("not tried") for c in (found, ROWS[family]))]
    assert {name: found[name] for name in tried} == {name: ROWS[family][name] for name in tried}
    assert not any(cell.startswith("failed") for cell in found.values())
