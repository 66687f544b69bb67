"""Sentences of commands that differ, on purpose, from those of commit 4e062de.

A pair: what the golden text says, and what is said now. It is applied to stdout, Markdown and the sentences
in JSON alone: numbers, tables, CSV, keys and names of files stay as they were.
"""

REPORTS: list[tuple[str, str]] = [
    ("Left out, being no true or false a prompt:", "Left out, because not true or false for each prompt:"),
    ("the model that this adapter sits on is not on this", "the base of this adapter is not on this"),
    ("what it came from is not known here", "its parents are not known on this machine"),
    (", and was 'You are kind.' in training before", ", but was 'You are kind.' in the parent's training"),
]

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


def _soap(seconds: str) -> str:
    """The lines of a plan with SOAP after which its traffic is printed now."""
    return (
        "SOAP's products, refreshes at most\n"
        f"  seconds a step                  {seconds:>14}  without probe, exports\n"
    )


def _traffic(gigabytes: str) -> str:
    amount = f"{gigabytes} GB"
    return f"  sent by a rank for the optimizer{amount:>14}  a step, on average\n"


PLANS: list[tuple[str, str]] = [
    ("0.000e+00  SOAP's products, refreshes at most", "0.000e+00  elementwise operations are not counted"),
    (_soap("5.97"), _soap("5.97") + _traffic("32.6")),
    (_soap("5.34"), _soap("5.34") + _traffic("8.95")),
    (_soap("1.24"), _soap("1.24") + _traffic("6.22")),
]


def reworded(text: str, pairs: list[tuple[str, str]]) -> str:
    """A golden text as it reads today."""
    for then, now in pairs:
        text = text.replace(then, now)
    return text
