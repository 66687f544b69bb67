"""Every parameter whole, gathered by DeepSpeed's public means: the truth that shards are held to."""

from typing import Any

import torch


def whole_weights(engine: Any, masters: bool = True) -> dict[str, torch.Tensor]:
    """Copies on every rank, by name; all ranks call it together.

    Args:
        masters: those in fp32 of what is trained in bf16.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.model.named_parameters():
        if masters and parameter.requires_grad:
            found[name] = safe_get_full_fp32_param(parameter).detach().to("cpu", copy=True)
        else:
            with GatheredParameters([parameter]):
                found[name] = parameter.detach().to("cpu", copy=True)
    return found
