"""Sentences of commands that were reworded since commit 4e062de.

A pair is the golden sentence and the current one. It is applied to stdout, Markdown and the sentences
in JSON alone: numbers, tables, CSV, keys and names of files stay as they were.
"""

WARNINGS: list[tuple[str, str]] = [  # in results.jsonl
    (" answers were cut off", " responses were cut off"),
    (
        " answers gave no letter before they were cut off at max_new_tokens",
        " responses were cut off at max_new_tokens without a letter",
    ),
    ("A to D together have ", "A to D have "),
    (
        " of the probability: the model would write something else",
        " of the probability in total: the model would generate something else",
    ),
]


def reworded(text: str, pairs: list[tuple[str, str]]) -> str:
    """A golden text in today's wording."""
    for then, now in pairs:
        text = text.replace(then, now)
    return text
