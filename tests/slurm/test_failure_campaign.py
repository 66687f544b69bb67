"""Failures of a job on a cluster: it recovers without help and gives the undisturbed run.

pytest -m slow tests/slurm/test_failure_campaign.py -s    some 15 minutes; prints the time each case costs

Three virtual nodes with separate networks, two for the job and one spare.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.conftest import virtual_cluster
from tests.slurm.test_job import RUN, SCRIPT, digest, rank_of, undisturbed, until_step, without_slurm
from tests.slurm.virtual import Cluster
from tests.training.resuming import timeless

assert undisturbed  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MOMENT = 12  # the step at which the failure happens
# Slurm takes half a minute to detect a dead slurmd, and checks limits twice a minute.
LONG = [*RUN, "train.steps=400"]
LONGER = [*LONG, "train.batch_size=32", "state.every_steps=null"]


@pytest.fixture(scope="module")
def networked() -> Iterator[Cluster]:
    yield from virtual_cluster(nodes=3, net="netns")


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_slurm(tmp_path_factory.mktemp("long"), *LONG)


def nothing(cluster: Cluster, job: str) -> None:
    """No failure, for comparison."""


def preempted(cluster: Cluster, job: str) -> None:
    overrides = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    cluster.run("sbatch", *overrides)


def rank_killed(cluster: Cluster, job: str) -> None:
    os.kill(rank_of(cluster.node(2), "name=red"), signal.SIGKILL)


def rank_0_killed(cluster: Cluster, job: str) -> None:
    os.kill(rank_of(cluster.node(1), "name=red"), signal.SIGKILL)


def rank_frozen(cluster: Cluster, job: str) -> None:
    os.kill(rank_of(cluster.node(2), "name=red"), signal.SIGSTOP)


def node_down(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", f"nodename={cluster.node(2)}", "state=down", "reason=test")


def first_node_down(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", f"nodename={cluster.node(1)}", "state=down", "reason=test")


def slurmd_killed(cluster: Cluster, job: str) -> None:
    kill_slurmd(cluster, 2)


def first_slurmd_killed(cluster: Cluster, job: str) -> None:
    """The job's own process and rank 0 keep running there, beyond Slurm's control."""
    kill_slurmd(cluster, 1)


def kill_slurmd(cluster: Cluster, node: int) -> None:
    path = cluster.folder / "run" / f"slurmd.{cluster.node(node)}.pid"
    os.kill(int(path.read_text()), signal.SIGKILL)


def network_cut(cluster: Cluster, job: str) -> None:
    link(cluster, 2, "down")


def first_network_cut(cluster: Cluster, job: str) -> None:
    link(cluster, 1, "down")


def link(cluster: Cluster, node: int, state: str) -> None:
    overrides = ["ip", "-n", cluster.node(node), "link", "set", "eth0", state]
    subprocess.run(overrides, check=True)


CASES = [
    nothing, preempted, rank_killed, rank_0_killed, rank_frozen, node_down, first_node_down,
    network_cut, first_network_cut, slurmd_killed, first_slurmd_killed,
]  # fmt: skip


@pytest.mark.parametrize("happens", CASES)
def test_a_disturbed_job_ends_as_the_undisturbed_run(
    networked: Cluster,
    submit_from: Path,
    request: pytest.FixtureRequest,
    happens: Callable[[Cluster, str], None],
):
    cluster, long = networked, happens in (slurmd_killed, first_slurmd_killed)
    expected = request.getfixturevalue("undisturbed_long" if long else "undisturbed")
    run, options = submit_from / "runs" / "red", ["--time=60", "--partition=low"]
    job = cluster.submit(submit_from, *options, *SCRIPT, *(LONG if long else RUN))
    cluster.when(job, lambda job: job["JobState"] == "RUNNING")
    assert cluster.job(job)["NodeList"] == f"{cluster.prefix}[1-2]"  # the third is spare
    try:
        until_step(run, MOMENT)
        at, began = last_step(run), time.monotonic()
        happens(cluster, job)
        if happens is not nothing:
            cluster.when(job, lambda job: job["Restarts"] != "0", within=180)
            until_regained(run, at, cluster, job)
        lost = time.monotonic() - began
        assert cluster.until(job, within=300) == "COMPLETED", cluster.log(job)
        assert digest(run) == digest(expected)
        assert timeless(run) == timeless(expected)
        starts = int(cluster.job(job)["Restarts"])
        assert starts == (happens is not nothing), cluster.log(job)
        print(f"{happens.__name__:20} {lost:5.0f} s lost")
    finally:
        cluster.tried("scancel", job)
        for node in (1, 2):
            link(cluster, node, "up")
        cluster.up()


def last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return max(int(line.split(":")[1].split(",")[0]) for line in lines if line.startswith('{"step"'))


def until_regained(run: Path, step: int, cluster: Cluster, job: str) -> None:
    """Wait until the last step before the failure has been repeated, and one more."""
    deadline = time.monotonic() + 300
    while "resuming after step" not in cluster.log(job) or last_step(run) <= step:
        assert time.monotonic() < deadline, cluster.log(job)
        time.sleep(0.1)


def test_a_job_that_reaches_its_time_limit_twice(networked: Cluster, submit_from: Path, tmp_path: Path):
    """The warning comes 60 to 110 s after each start; every start adds steps until the run is complete."""
    expected = without_slurm(tmp_path / "undisturbed", *LONGER)
    options = ["--time=2", "--signal=B:USR1@30"]
    job = networked.submit(submit_from, *options, *SCRIPT, *LONGER)
    assert networked.until(job, within=800) == "COMPLETED", networked.log(job)
    run = submit_from / "runs" / "red"
    assert digest(run) == digest(expected) and timeless(run) == timeless(expected)
    assert int(networked.job(job)["Restarts"]) >= 1, "it was too fast to be disturbed"
    print(f"time limit: {networked.job(job)['Restarts']} requeues, {networked.log(job)}")


def test_a_disk_filled_by_another_process(networked: Cluster, submit_from: Path):
    """Another start would find no more space: FAILED, with the reason, and not requeued."""
    small = submit_from / "runs"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", small], check=True)
    try:
        job = networked.submit(submit_from, *SCRIPT, *LONG)
        until_step(small / "red", 3)
        with suppress(OSError), open(small / "others", "wb") as others:
            while others.write(b"\0" * 2**20):
                pass
        assert networked.until(job) == "FAILED", networked.log(job)
        output = networked.log(job)
        assert networked.job(job)["Restarts"] == "0" and "No space left" in output, output
        assert "refused at step" in output and "not requeued" in output, output
    finally:
        networked.tried("scancel", job)
        subprocess.run(["umount", "-l", small], check=True)
