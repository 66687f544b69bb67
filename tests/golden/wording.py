"""Sentences of commands that differ, on purpose, from those of commit 4e062de.

A pair: what the golden text says, and what is said now. It is applied to stdout and Markdown alone:
numbers, tables, CSV and names of files stay as they were.
"""

REPORTS: list[tuple[str, str]] = []
PLANS: list[tuple[str, str]] = []


def reworded(text: str, pairs: list[tuple[str, str]]) -> str:
    """A golden text as it reads today."""
    for then, now in pairs:
        text = text.replace(then, now)
    return text
