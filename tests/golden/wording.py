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


def _soap(seconds: str) -> str:
    """The lines of a plan with SOAP after which its traffic is printed now."""
    return (
        "SOAP's products, refreshes at most\n"
        f"  seconds a step                  {seconds:>14}  without probe, exports\n"
    )


def _label(text: str) -> str:
    """The first column of a plan, with its padding."""
    return f"  {text:<32}"


def _traffic(gigabytes: str) -> str:
    amount = f"{gigabytes} GB"
    return f"{_label('optimizer traffic per rank')}{amount:>14}  per step, on average\n"


PLANS: list[tuple[str, str]] = [
    ("0.000e+00  SOAP's products, refreshes at most", "0.000e+00  elementwise operations are not counted"),
    (_soap("5.97"), _soap("5.97") + _traffic("32.6")),
    (_soap("5.34"), _soap("5.34") + _traffic("8.95")),
    (_soap("1.24"), _soap("1.24") + _traffic("6.22")),
    ("memory, the fullest GPU  ", "memory of the fullest GPU"),
    ("  the six above\n", "  sum of the six above\n"),
    ("  the four above\n", "  sum of the four above\n"),
    ("state.keep, and a newer one", "state.keep, and one being written"),
    (_label("stays"), _label("resident")),
    (_label("a layer at work, or the logits"), _label("memory of a layer, or logits")),
    (_label("gradients on their way"), _label("gradients in transfer")),
]


def reworded(text: str, pairs: list[tuple[str, str]]) -> str:
    """A golden text in today's wording."""
    for then, now in pairs:
        text = text.replace(then, now)
    return text
