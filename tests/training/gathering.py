"""Full parameters, gathered through DeepSpeed's public API: the reference for shards."""

from typing import Any

import torch


def whole_weights(engine: Any, masters: bool = True) -> dict[str, torch.Tensor]:
    """Full copies of all parameters by name, on every rank; a collective call.

    Args:
        masters: the fp32 master weights of parameters that are trained in bf16.
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
