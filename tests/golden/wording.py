"""Sentences of commands that were reworded since commit 4e062de.

A pair is the golden sentence and the current one. It is applied to stdout, Markdown and the sentences
in JSON alone: numbers, tables, CSV, keys and names of files stay as they were.
"""

REPORTS: list[tuple[str, str]] = [
    ("Left out, being no true or false a prompt: ", "Left out (not boolean per prompt): "),
    ("the model that this adapter sits on is not on this", "the base of this adapter is not on this"),
    ("what it came from is not known here", "its parents are not known on this machine"),
    (", and was 'You are kind.' in training before", ", but was 'You are kind.' in the parent's training"),
    (
        "Pairs are answers to the same prompt. A, B and their difference are shares of the pairs, the "
        "difference and its\ninterval (Newcombe's method 10) in percentage points; p is McNemar's "
        "exact test, two-sided, not corrected for\nthe ",
        "Pairs are responses to the same prompt. A and B are shares of the pairs; B - A and its interval "
        "(Newcombe's method 10)\nare in percentage points. p: McNemar's exact test, two-sided, not corrected "
        "for the ",
    ),
    (" tests of this table.", " tests in this table."),
    ("Organisms, and what is judged against them:", "Organisms and the runs judged against them:"),
    (
        "Without a capability above 0 that was measured on the organism in the same way: ",
        "No nonzero capability was measured on the organism with the same settings for: ",
    ),
    (" measures what the run started from as well.", " also measures the run's parent."),
    ("Not measured alike: ", "Measured with different settings: "),
    ("other prompts: ", "different prompts: "),
    (", whole against miniature.", ", whole vs miniature."),
    (
        "95 % intervals: of one seed Wilson's, over prompts; of several Korn and Graubard's, over "
        "organisms where a\ncell has several of them, else over runs. Seeds that agree tell of prompts alone: ",
        "95 % intervals: Wilson over prompts for one seed; Korn and Graubard over organisms (or runs, if a "
        "cell has one\norganism) for several. With ",
    ),
    (" alike leave open that up\nto ", " seeds that agree, up to "),
    (" of all seeds would be otherwise.", " of all seeds could still differ."),
    ("Not here: ", "Left out: "),
    ("another run repeats it.", "duplicate of another run."),
    ("no organism in its chain.", "no organism in its lineage."),
    ("the triggered rate's interval ends below ", "the interval of the triggered rate is below "),
    (" %, and every capability is at least ", " % and every capability is at least "),
    (
        " of the\norganism's; broken: one is not; not removed: the interval begins above ",
        " of\nthe organism's; broken: a capability is below that; not removed: the interval is above ",
    ),
    *(
        (
            f"unclear: it does not tell\n(removed_below={share},",
            f"unclear: the interval\nincludes {percent} % (removed_below={share},",
        )
        for share, percent in (("0.05", 5), ("0.2", 20), ("1", 100))
    ),
    (
        "not ours; its digest is as recorded, its files were not read: ",
        "external; digest as recorded, files not read: ",
    ),
    *(
        (f"# What {name} came from\n", f"# Lineage of {name}\n")
        for name in (
            "demo-depirate",
            "demo-experiment_blue_pirate",
            "depirate",
            "depirate-s0",
            "misfit",
            "of_foreign",
        )
    ),
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
